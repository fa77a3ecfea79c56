"""The array tools under `vista prepare`, against what numpy says of small cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vista.data.arrays import ArrayWriter, chunk_bounds, ragged_rows, read_slice, save_array, search_ranges

LENGTHS = st.lists(st.integers(0, 9), max_size=12).map(lambda lengths: np.array(lengths, np.int64))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_growing_array_is_what_was_appended(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.npy"
    with ArrayWriter(path, dtype) as writer:
        for size in (0, 3, 1, 120_000):
            writer.append(np.arange(size))
    wanted = np.concatenate([np.arange(3), np.arange(1), np.arange(120_000)]).astype(dtype)
    np.testing.assert_array_equal(np.load(path), wanted)
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), wanted)
    assert np.load(path).dtype == dtype
    np.testing.assert_array_equal(read_slice(path, 2, 70_001), wanted[2:70_001])
    assert len(read_slice(path, 5, 5)) == 0


def test_nothing_appended_is_an_empty_array(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a.npy", np.int32):
        pass
    assert np.load(tmp_path / "a.npy").shape == (0,)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0), (4, 3)])
def test_a_saved_array_is_read_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    save_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    save_array(tmp_path / "t.npy", array.T)  # in the order of its rows, however it lies in memory
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), array.T)


@given(lengths=LENGTHS, gap=st.integers(0, 5))
def test_ragged_rows(lengths: np.ndarray, gap: int) -> None:
    starts = np.cumsum(lengths + gap) - lengths
    wanted = [start + i for start, length in zip(starts.tolist(), lengths.tolist(), strict=True) for i in range(length)]
    assert ragged_rows(starts, lengths).tolist() == wanted


@given(lengths=LENGTHS, target=st.integers(1, 20))
def test_chunks_cover_all_rows_and_keep_their_size(lengths: np.ndarray, target: int) -> None:
    bounds = list(chunk_bounds(lengths, target))
    assert [row for first, end in bounds for row in range(first, end)] == list(range(len(lengths)))
    for first, end in bounds:
        assert end - first == 1 or lengths[first:end].sum() <= target


@given(data=st.data(), lengths=LENGTHS)
def test_search_in_many_ranges(data: st.DataObject, lengths: np.ndarray) -> None:
    numbers = st.integers(-5, 5)
    ranges = [sorted(data.draw(st.lists(numbers, min_size=n, max_size=n))) for n in lengths.tolist()]
    limits = np.array([data.draw(numbers) for _ in ranges], np.int64)
    values = np.array([v for part in ranges for v in part], np.int64)
    end = np.cumsum(lengths)
    found = search_ranges(values, end - lengths, end, limits)
    inside = [np.searchsorted(part, limit) for part, limit in zip(ranges, limits, strict=True)]
    assert found.tolist() == (end - lengths + np.array(inside, np.int64)).tolist()
