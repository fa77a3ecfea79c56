"""The lifelong benchmark: what is run and what is not run again, what it concludes, and what a person sees of it."""

from __future__ import annotations

import re
from math import nan
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import vista.benchmark.cells
from vista.benchmark.cells import Cell, Plan, run_plan
from vista.benchmark.entries import ENTRIES, choose
from vista.benchmark.report import write_benchmark
from vista.benchmark.sets import NEGATIVES, converted, own_log, worlds
from vista.benchmark.verdict import judge, rewarded_length
from vista.cli.main import app
from vista.data.prepare import PrepareOptions
from vista.data.public import CONVERTERS
from vista.errors import ConfigError
from vista.evaluation.results import Evaluation

SMALL = {"users": 24, "events": 120, "requests": 6, "touched": 8}
TRAINING = {"train.max_steps": 2, "train.requests_per_step": 64}


def small_plan(**changes: Any) -> Plan:
    values = {"sets": worlds(["membership"], 0, SMALL), "entries": choose(["recent", "counts"]), "seeds": [0, 1]}
    return Plan(**{**values, "training": TRAINING} | changes)


def lines(plan: Plan, out: Path, budget: float = 0.0) -> tuple[dict[str, list[Cell]], list[str]]:
    said: list[str] = []
    return run_plan(plan, out, budget, said.append), said


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Cell]]]:
    out = tmp_path_factory.mktemp("benchmark")
    return out, lines(small_plan(), out)[0]


def test_every_entry_runs_with_every_seed_seed_by_seed(done):
    _, cells = done
    assert [(c.entry, c.seed) for c in cells["membership"]] == [
        ("recent", 0), ("counts", 0), ("recent", 1), ("counts", 1),
    ]  # fmt: skip
    assert all(c.steps == 2 and c.evaluation.metrics["click"]["ne"] > 0 for c in cells["membership"])


def test_finished_cells_are_not_run_again(done, monkeypatch):
    out, cells = done

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(vista.benchmark.cells, "train", refuse)
    again, _ = lines(small_plan(), out)
    assert [c.evaluation.metrics for c in again["membership"]] == [c.evaluation.metrics for c in cells["membership"]]
    with pytest.raises(AssertionError, match="trained again"):
        lines(small_plan(training=TRAINING | {"train.dense_lr": 0.001}), out)


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    plan = small_plan(entries=choose(["counts"]), seeds=[0], training=TRAINING | {"train.max_steps": 4})
    whole, _ = lines(plan, tmp_path / "whole")
    monkeypatch.setattr(vista.benchmark.cells, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lines(plan, tmp_path / "cut")
    monkeypatch.undo()
    (weights,) = (tmp_path / "cut").rglob("model.safetensors")
    before = weights.stat().st_mtime_ns
    resumed, _ = lines(plan, tmp_path / "cut")
    assert weights.stat().st_mtime_ns == before  # there was no step left
    assert resumed["membership"][0].evaluation.metrics == whole["membership"][0].evaluation.metrics


def interrupt(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_no_cell_is_begun_beyond_the_budget_but_cached_ones_count(done, tmp_path):
    out, _ = done
    nothing, said = lines(small_plan(), tmp_path, budget=1e-9)
    assert nothing == {"membership": []}
    assert all("left out" in line for line in said)
    assert len(lines(small_plan(), out, budget=1e-9)[0]["membership"]) == 4


def test_the_page_says_what_was_run_and_what_follows(done):
    out, cells = done
    page = write_benchmark(small_plan(seeds=[0, 1, 2]), cells, out, ["vista", "benchmark", "lifelong"])
    text = (out / "benchmark.md").read_text()
    assert "Partial**: 4 of 6 runs" in text
    assert "vista benchmark lifelong" in text
    assert "best possible" in text
    assert "| counts | 1,680 |" in text  # 120 events of 14 bytes
    for name in (
        "cost.png",
        "report/by_positive_distance.png",
        "report/by_history_length.png",
        "report/learning_curve.png",
    ):
        assert f"(membership/{name})" in text
        assert (out / "membership" / name).exists()
    for fact in ("Machine: ", "cores", "Versions: vista ", "SHA-256", '"world": "membership"'):
        assert fact in text
    assert page.read_text().count("data:image/png") == 4
    assert (out / "membership" / "report" / "index.html").exists()


def cell(entry: str, seed: int, ne: float) -> Cell:
    return Cell(entry, seed, Evaluation(entry, {"click": {"ne": ne}}), 1.0, 10, 100, 1000)


def cells_of(**ne: list[float]) -> list[Cell]:
    return [
        cell(name.replace("_", "-"), seed, value) for name, all_ne in ne.items() for seed, value in enumerate(all_ne)
    ]


def test_a_set_is_lifelong_only_if_both_controls_are_beaten_surely():
    sure = judge("x", cells_of(recent=[0.9, 0.91], counts_64=[0.8, 0.81], counts=[0.95, 0.95], vista=[0.7, 0.712]), {})
    assert (sure.best, sure.is_lifelong) == ("vista", True)
    assert "vista beats recent by 0.1990" in sure.sentence()
    assert "the whole history pays here" in sure.sentence()
    unsure = judge("x", cells_of(recent=[0.9, 0.91], counts_64=[0.7, 0.81], vista=[0.7, 0.71]), {})
    assert not unsure.is_lifelong
    assert "not enough to call this set lifelong" in unsure.sentence()
    alone = judge("x", cells_of(recent=[0.9], counts_64=[0.8], vista=[0.7]), {})
    assert not alone.is_lifelong
    assert "run more seeds" in alone.sentence()
    assert "nan" not in alone.sentence()
    behind = judge("x", cells_of(recent=[0.5, 0.51], counts_64=[0.8, 0.81], vista=[0.7, 0.71]), {})
    assert "vista is behind recent by 0.2000" in behind.sentence()
    assert "and beats counts-64 by 0.1000" in behind.sentence()
    nothing = judge("x", cells_of(recent=[0.9], din=[0.8]), {})
    assert "no entry here reads the whole history" in nothing.sentence()
    unknown = judge("x", cells_of(recent=[nan] * 3, counts=[nan] * 3), {})
    assert "NE cannot be measured" in unknown.sentence()
    assert "seed" not in unknown.sentence()


def test_the_whole_history_is_a_summary_or_exact_counts_and_no_window():
    """`recent+counts` reads all of it; `din` reads its newest events, and cut counts theirs."""
    names = ["recent+counts", "vista-tokens", "vista+counts@count_last_events=64", "counts@count_predecessors=4"]
    assert all(entry.reads_all({}) for entry in choose(names))
    cut = ["din", "din-256", "mean", "recent-4096", "counts@count_last_events=64", "recent+counts@count_last_events=64"]
    assert not any(entry.reads_all({}) for entry in choose(cut))
    assert not choose(["counts"])[0].reads_all({"model.count_last_events": 64})
    assert not choose(["vista@num_seeds=0"])[0].reads_all({})
    best = judge(
        "x", cells_of(recent=[0.9], counts_64=[0.8], din_128=[0.6], counts=[0.85], **{"recent+counts": [0.7]}), {}
    )
    assert best.best == "recent+counts"


def test_the_rewarded_length_is_the_first_that_the_whole_history_does_not_surely_beat():
    cuts = {"counts_64": [0.9, 0.9], "counts_512": [0.8, 0.801], "counts_4096": [0.7, 0.699]}
    assert rewarded_length(cells_of(counts=[0.7, 0.7], **cuts)) == 4096
    assert rewarded_length(cells_of(counts=[0.5, 0.5], **cuts)) == 0
    assert rewarded_length(cells_of(counts=[0.9, 0.9], **cuts)) == 64
    assert rewarded_length(cells_of(counts=[0.9, 0.9])) is None
    assert rewarded_length(cells_of(counts=[0.6], counts_64=[0.9], counts_512=[0.7])) is None, "one seed"
    other = {"counts-64@count_predecessors=4": [0.7, 0.7], "counts-64@count_last_events=128": [0.7, 0.7]}
    assert rewarded_length(cells_of(counts=[0.7, 0.7], **cuts, **other)) == 4096, "other models with a cut"


def test_whoever_is_named_twice_runs_once():
    assert [entry.name for entry in choose(["counts", "recent", "counts"])] == ["counts", "recent"]


def test_an_own_log_is_prepared_by_the_protocol_and_judged_in_one_sentence(tmp_path):
    number = range(1500)
    log = pl.DataFrame({"user_id": [n % 30 for n in number], "item_id": [n * n % 37 for n in number],
                        "timestamp": [1_600_000_000 + 60 * n for n in number]})  # fmt: skip
    log.write_csv(tmp_path / "shop.csv")
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--models",
        "recent,counts-64,counts",
        "--seeds",
        "0",
        "--max-steps",
        "2",
    ]
    command = ["benchmark", "lifelong", "--events", str(tmp_path / "shop.csv"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    recent, counts = (
        float(re.search(rf"shop, {name}, seed 0: \w+ NE (\S+)", result.output)[1]) for name in ("recent", "counts")
    )
    verb = "beats" if counts < recent else "is behind"
    said = re.search(rf"shop: with one seed, counts {verb} recent by (0\.\d+) NE", result.output)
    assert float(said[1]) == pytest.approx(abs(recent - counts), abs=2e-4)
    assert (tmp_path / "out" / "index.html").exists()
    options = own_log(PrepareOptions(str(tmp_path / "shop.csv"))).options(tmp_path)
    assert {name: getattr(options, name) for name in NEGATIVES} == NEGATIVES
    log.head(1000).write_csv(tmp_path / "shop.csv")  # the log is another one now
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "or of other files" in again.output


def test_a_copy_of_a_public_log_is_told_from_another_one(tmp_path):
    def made(text: str) -> object:
        (tmp_path / "ratings.dat").write_text(text)
        return converted("x", "", "movielens", tmp_path, CONVERTERS["movielens"].options()).described

    assert made("1::1::5::1") == made("2::2::4::2")  # of a large folder names and sizes are looked at
    assert made("1::1::5::1") != made("1::1::5::1\n1::2::5::2")


def test_an_own_log_with_impressions_is_measured_on_what_was_shown(done, tmp_path):
    log = done[0] / "membership" / "log"
    tables = [w for name in ("events", "items", "impressions") for w in (f"--{name}", str(log / f"{name}.parquet"))]
    arguments = ["--models", "recent,counts", "--seeds", "0", "--max-steps", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["benchmark", "lifelong", *tables, *arguments])
    assert result.exit_code == 0, result.output
    assert "| click | best possible |" in (tmp_path / "benchmark.md").read_text()  # shown ones have a true score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vist"], "did you mean 'vista'"),
        (["--models", "counts+counts"], "has counts twice"),
        (["--worlds", "needel"], "did you mean 'needle'"),
        (["--seeds", "one"], "whole numbers"),
        (["--seeds", ","], "whole numbers"),
        (["--models", ","], "name at least one entry"),
        (["--size", "huge"], "unknown"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_run(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["benchmark", "lifelong", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_entries_resolve_at_every_size():
    for entry in (
        *ENTRIES.values(),
        *choose(["recent+counts", "vista+counts", "sim-soft+counts", "din-256", "sim-soft-256+counts"]),
    ):
        for size in ("tiny", "small", "base"):
            assert entry.config(size, 3, {}).train.seed == 3
    for wrong in ("nothing", "vista-64", "din-", "counts-64-64"):
        with pytest.raises(ConfigError, match="there is no entry"):
            choose([wrong])


def test_a_number_behind_an_entry_cuts_it_to_so_many_events():
    recent, counts, din = (entry for entry in choose(["recent-512", "counts-4096", "din-256+counts"]))
    assert recent.config("tiny", 0, {}).model.recent_events == 512
    assert counts.config("tiny", 0, {}).model.count_last_events == 4096
    assert (din.config("tiny", 0, {}).model.history_events, din.config("tiny", 0, {}).model.model) == (
        256,
        "din+counts",
    )
