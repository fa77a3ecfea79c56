"""Quality along an axis, and the files that say a whole benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vista.benchmark.axes
from vista.benchmark.axes import Sweep, check_axes, plot_sweep, stored, sweep_axes
from vista.benchmark.cells import Plan, run_plan
from vista.benchmark.configs import read_config
from vista.benchmark.entries import choose
from vista.benchmark.sets import Axis, worlds
from vista.cli.main import app
from vista.data.counts import last_met
from vista.data.histories import PreparedData
from vista.data.worlds import read_detail
from vista.errors import ConfigError, StaleOutput

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "benchmark").glob("*.toml"))
SMALL = {"users": 24, "events": 120, "requests": 6, "touched": 8}


def plan(**axis: Any) -> Plan:
    sets = [replace(one, axis=Axis.of(axis, "axis")) for one in worlds(["membership"], 0, SMALL)]
    training = {"train.max_steps": 2, "train.requests_per_step": 64}
    return Plan(sets, choose(["recent", "counts", "vista"]), [0, 1], training=training)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axes")
    run_plan(plan(events=[120]), folder, say=lambda text: None)
    return folder


def sweep(out: Path, **axis: Any) -> Sweep:
    asked = plan(**axis)
    cells = run_plan(asked, out, say=lambda text: None)
    return sweep_axes(asked, out, cells, lambda text: None)["membership"]


def test_models_are_scored_on_worlds_of_other_lengths_without_training_again(out, monkeypatch):
    monkeypatch.setattr(vista.benchmark.cells, "train", None)
    found = sweep(out, events=[120, 480])
    assert {(s.entry, s.seed, s.point) for s in found.scores} == {
        (entry, seed, point) for entry in ("recent", "counts", "vista") for seed in (0, 1) for point in (0, 1)
    }
    assert found.trained_at == 120
    assert found.places == [120.0, 480.0]
    assert all(best is not None and best["auc"] == 1.0 for best in found.best)  # membership has no noise
    assert "480" in found.table("ne").header
    assert found.metrics == ("ne", "auc", "rare_auc")
    rare = found.table("rare_auc")
    assert [row[0].text for row in rare.rows] == ["recent", "counts", "vista", "best possible"]
    assert plot_sweep(found).axes[0].get_xlabel() == "events"


def test_details_of_a_world_stand_beside_the_impressions_they_are_of(out):
    """The age that the world wrote is the distance that prepared data tells; what is not written is None."""
    data = PreparedData.open(out / "membership" / "data")
    found = read_detail(out / "membership" / "log", data, "test", "age_events")
    np.testing.assert_array_equal(found, last_met(data.histories, data.impressions("test")))
    assert len(np.unique(found)) > 10
    assert read_detail(out / "membership" / "log", data, "test", "gap_events") is None


@pytest.mark.parametrize(("axis", "share"), [({"events": "400"}, 0.2), ({"ages": "100"}, 1.0)])
def test_all_requests_count_where_a_world_fixes_how_long_ago_the_answer_lies(axis, share, tmp_path):
    [one] = worlds(["needle"], 0, {"users": 6, "events": 300, "requests": 16})
    trained = one.open(tmp_path / "trained")
    data = one.at(axis, trained.folder).open(tmp_path / "test")
    num_requests = {split: data.impressions(split).num_requests for split in ("train", "validation", "test")}
    assert num_requests["validation"] == 0
    assert num_requests["test"] / sum(num_requests.values()) == pytest.approx(share, abs=0.02)


def test_a_score_that_is_there_is_not_measured_again(out, monkeypatch):
    first = sweep(out, events=[120, 480])

    def refuse(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(vista.benchmark.axes, "score_impressions", refuse)
    assert sweep(out, events=[120, 480]).scores == first.scores


def test_a_codec_changes_tokens_and_bytes_of_models_with_a_summary_alone(out):
    found = sweep(out, codec=["float32", "int8"])
    scores = {(s.entry, s.point): s for s in found.scores if s.seed == 0}
    assert scores["counts", 0].metrics == scores["counts", 1].metrics
    assert scores["vista", 0].num_bytes > scores["vista", 1].num_bytes
    assert scores["vista", 0].metrics["ne"] != scores["vista", 1].metrics["ne"]
    assert scores["vista", 0].metrics["ne"] == pytest.approx(scores["vista", 1].metrics["ne"], abs=0.01)


def test_tokens_after_a_way_through_the_store():
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stored(tokens, "float32"), tokens)
    assert 0 < (stored(tokens, "int8") - tokens).abs().max() < 0.05


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"events": [1, 2], "ages": [1, 2, 3]}, "ages has 3 values, events has 2"),
        ({"codec": ["int9"]}, "unknown codec 'int9'"),
        ({"items": [5, 6]}, "items cannot change"),
    ],
)
def test_an_axis_that_makes_no_sense_is_refused(axis, message):
    with pytest.raises(ConfigError, match=message):
        Axis.of(axis, "axis")


def test_a_point_that_its_world_refuses_is_told_before_anything_is_trained():
    with pytest.raises(ConfigError):
        check_axes(plan(touched=[8, 10**9]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_of_the_repository_is_a_benchmark(path, tmp_path):
    needs_copy = "converter" in path.read_text().split("[options]")[0]
    found = read_config(path, tmp_path if needs_copy else None)
    assert found.one.name == path.stem
    entries = choose(found.run.models or ())
    assert all(entry.config(found.run.size or "tiny", 0, dict(found.run.settings)) for entry in entries)
    published = found.one.published
    assert published is None or (published.protocol and published.difference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("set = 1", "outside a table"),
        ("[set]\nname = 'x'", "either a converter or a world"),
        ("[set]\nname = 'x'\nworld = 'membershop'", "did you mean"),
        ("[set]\nname = 'x'\nworld = 'membership'\n[options]\nevent = 5", "did you mean 'events'"),
        ("[set]\nname = 'x'\nworld = 'membership'\n[run]\nmax_steps = 0", "max_steps = 0"),
        ("[set]\nname = 'x'\nworld = 'membership'\n[oder]\n", "unknown 'oder'"),
        ("[set]\nname = 'x'\nconverter = 'taobao'", "--from"),
        ("[set", "not a readable TOML file"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(text, message, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path, None)


def test_entries_that_differ_in_a_setting_alone_stay_apart(tmp_path):
    asked = replace(
        plan(events=[120]), entries=choose(["vista-tokens@num_seeds=4", "vista-tokens@num_seeds=8"]), seeds=[0]
    )
    cells = run_plan(asked, tmp_path, say=lambda text: None)["membership"]
    assert [cell.evaluation.model for cell in cells] == ["vista-tokens@num_seeds=4", "vista-tokens@num_seeds=8"]
    assert cells[0].bytes_per_user < cells[1].bytes_per_user
    with pytest.raises(ConfigError, match="did you mean 'num_seeds'"):
        choose(["vista@num_seed=4"])


def test_a_set_with_other_settings_is_not_mixed_up_with_the_one_that_is_there(out):
    (other,) = worlds(["membership"], 0, SMALL | {"touched": 9})
    with pytest.raises(StaleOutput, match="with other settings"):
        other.open(out / "membership")


LOG = """[set]
name = "clicks"
converter = "taobao"
[run]
models = ["recent", "counts"]
seeds = [0]
max_steps = 2
[published]
source = "a paper"
protocol = "split by user"
difference = "split by time"
rows = [{model = "Counting", ours = "counts", auc = 0.7}, {model = "Another", auc = 0.8}]
"""


def test_one_command_runs_a_file_on_a_copy_and_shows_what_others_published(tmp_path):
    start_s = 1_511_539_200
    rows = [f"{n % 20},{n * n % 37},{n % 5},pv,{start_s + 300 * n}\n" for n in range(1000)]
    (tmp_path / "UserBehavior.csv").write_text("".join(rows))
    (tmp_path / "clicks.toml").write_text(LOG)
    arguments = ["benchmark", "lifelong", "--config", str(tmp_path / "clicks.toml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--from", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "| published model | our entry | AUC, published | AUC, ours |" in text
    assert "| Counting | counts | 0.7 | 0." in text
    assert "| Another | - | 0.8 | - |" in text
    assert "split by user Ours: split by time" in text
    missing = CliRunner().invoke(app, arguments)
    assert missing.exit_code == 2
    assert "give it with --from" in missing.output
