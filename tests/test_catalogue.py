"""The item index: exact, stable, the same whatever way an id is written."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vista.catalogue import Catalogue, hash_ids, id_array
from vista.checkpoint import ModelSchema
from vista.errors import CheckpointError, DataError


def integers(ids: list[int], buckets: int = 4) -> Catalogue:
    return Catalogue(np.array(ids), np.arange(1 + buckets + len(ids), dtype=np.int32), buckets)


def strings(ids: list[str], buckets: int = 4) -> Catalogue:
    return Catalogue(id_array(ids), np.arange(1 + buckets + len(ids), dtype=np.int32), buckets)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1))
def test_every_item_has_an_index_of_its_own_and_comes_back(ids):
    catalogue = integers(ids)
    index = catalogue.encode(ids)
    assert len(set(index.tolist())) == len(ids)
    assert index.min() >= catalogue.first_item
    assert catalogue.decode(index) == ids


@given(st.lists(st.text(), unique=True, min_size=1))
def test_the_same_for_strings(ids):
    catalogue = strings(ids)
    assert catalogue.decode(catalogue.encode(ids)) == ids


def test_an_id_means_the_same_as_number_and_as_text():
    for catalogue in (integers([7, 20, 3]), strings(["7", "20", "3"])):
        known = catalogue.encode([20, 7])
        assert known.tolist() == catalogue.encode(["20", "7"]).tolist() == catalogue.encode([20, "7"]).tolist()
        unknown = [int(catalogue.encode([key])[0]) for key in (999, "999")]
        assert unknown[0] == unknown[1] == int(catalogue.encode(["x", 999])[1])


def test_an_unknown_id_gets_its_bucket_alone_or_among_others():
    catalogue = integers([1, 2, 3])
    alone = [int(catalogue.encode([key])[0]) for key in ("abc", 50, "007")]
    assert catalogue.encode(["abc", 50, "007"]).tolist() == alone
    assert all(1 <= index <= 4 for index in alone)
    assert catalogue.decode(np.array(alone)) == [None] * 3


@pytest.mark.parametrize("key", ["1" * 5000, "-" + "1" * 5000, "٣", "--1", "-0", "1" * 19, str(2**63)])
def test_text_that_is_no_integer_of_64_bits_is_an_unknown_id(key):
    assert 1 <= int(integers([1, 2, 3]).encode([key])[0]) <= 4


def test_one_long_id_does_not_make_all_others_long():
    ids = ["a"] * 20_000 + ["b" * 1024]
    tracemalloc.start()
    assert id_array(ids).tolist() == ids
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_hashes_are_fixed_for_all_time():
    """Stored embedding rows depend on them: a change of hash is a change of format."""
    assert hash_ids(np.array([0, 1, -1])).tolist() == [16294208416658607535, 10451216379200822465, 16490336266968443936]
    assert hash_ids(id_array(["a", "Ä"])).tolist() == [3405396810240292928, 14611611171946716124]


@pytest.mark.parametrize(("ids", "named"), [([1, None], "None"), ([1.5], "1.5"), ([True, "a"], "True")])
def test_what_is_no_id_is_named(ids, named):
    with pytest.raises(DataError, match=named):
        integers([1]).encode(ids)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    rows = np.arange(8, dtype=np.int32)
    catalogue = Catalogue(
        id_array(["b", "", "ä"]), rows, 4,
        features=(rows % 2)[:, None], feature_names=("kind",), feature_values=(("x",),),
        vectors={"image": np.ones((8, 3), np.float32)},
    )  # fmt: skip
    catalogue.save(tmp_path / "catalogue.safetensors")
    again = Catalogue.load(tmp_path / "catalogue.safetensors")
    assert again.fingerprint == catalogue.fingerprint
    assert again.ids.tolist() == ["b", "", "ä"]
    assert again.feature_sizes == (2,)
    assert again.vectors["image"].shape == (8, 3)
    assert again.encode(["ä"]).tolist() == [7]


def test_a_changed_row_or_feature_changes_the_fingerprint():
    base = integers([1, 2])
    assert integers([1, 2]).fingerprint == base.fingerprint
    assert integers([2, 1]).fingerprint != base.fingerprint
    rows = np.array([0, 1, 2, 3, 4, 5, 1], np.int32)
    assert Catalogue(np.array([1, 2]), rows, 4).fingerprint != base.fingerprint


def test_a_file_that_is_no_catalogue_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing here"):
        Catalogue.load(tmp_path / "nothing here")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a readable catalogue"):
        Catalogue.load(tmp_path / "bad")


def test_an_action_is_the_same_however_it_is_spelled():
    def schema(*actions: object) -> ModelSchema:
        return ModelSchema(("click",), actions, (), "-")

    assert schema(1.0, 2.5, 4.0).action_index([4, 4.0, "4", "4.0", 1, 2.5, "2.5", 3]) == [3, 3, 3, 3, 1, 2, 2, 0]
    assert schema(0, 1).action_index([True, False, "1", 1.0, "True"]) == [2, 1, 2, 2, 0]
    assert schema("1", "1.0").action_index(["1", "1.0"]) == [1, 2]
