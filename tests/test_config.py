"""Settings: names of models, what contradicts, and what a setting of another model does (nothing)."""

from __future__ import annotations

import pytest

from vista.config import MODELS, Config, resolve
from vista.errors import ConfigError


def resolved(**model: object) -> Config:
    return resolve("tiny", overrides={f"model.{name}": value for name, value in model.items()})


@pytest.mark.parametrize("name", MODELS)
def test_counts_can_stand_beside_every_model_but_counts(name):
    if name == "counts":
        with pytest.raises(ConfigError, match=r"'counts\+counts'; did you mean"):
            resolved(model="counts+counts")
        return
    plain, beside = resolved(model=name).model, resolved(model=f"{name}+counts").model
    assert (plain.kind, plain.with_counts) == (name, False)
    assert (beside.kind, beside.with_counts) == (name, True)
    assert plain.raw_events == beside.raw_events


def test_counts_reads_of_events_the_time_of_the_newest_alone():
    model = resolved(model="counts").model
    assert (model.kind, model.with_counts, model.raw_events) == ("counts", True, 1)


def test_each_model_reads_the_raw_events_of_its_own_setting():
    given = {"recent_events": 100, "history_events": 300}
    assert {name: resolved(model=name, **given).model.raw_events for name in MODELS} == {
        "vista": 100, "recent": 100, "counts": 1, "mean": 300, "din": 300, "sim": 300, "twin": 300, "sasrec": 300,
        "hstu": 300,
    }  # fmt: skip


def test_a_search_cannot_keep_more_than_there_is():
    with pytest.raises(ConfigError, match=r"top_k 128 is above history_events 100.*raise history_events or"):
        resolved(model="twin", history_events=100)
    assert resolved(model="din", history_events=100).model.top_k == 128  # without effect there


def test_an_unknown_model_or_search_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sasrec'"):
        resolved(model="sasrek")
    with pytest.raises(ConfigError, match="there is: hard, soft"):
        resolved(model="sim", search="x")


def test_a_config_comes_back_from_its_file():
    config = resolved(model="sim+counts", search="soft")
    assert Config.from_json(config.to_json()) == config


def test_all_activations_cannot_be_dropped():
    assert resolved(dropout=0.5).model.dropout == 0.5
    with pytest.raises(ConfigError, match=r"dropout = 1.0: a share, below 1"):
        resolved(dropout=1)
