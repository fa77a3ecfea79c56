"""The whole system in one go: an event log to histories, models, a store, a ranking, a table and a report.

Each step is the Python call behind the command of the same name, and prints that command, so that whoever watches can
do it again with a log of their own.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vista import api
from vista.checkpoint import Run
from vista.config import resolve
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare
from vista.data.worlds import WorldOptions, write_world
from vista.errors import StaleOutput
from vista.evaluation.evaluate import best_possible
from vista.evaluation.evaluate import evaluate as evaluate_run
from vista.evaluation.report import write_report
from vista.evaluation.tables import render_table
from vista.training.loop import train

WORLD = "lifelong"
DEMO_SETTINGS: dict[str, Any] = {"model.num_seeds": 64, "train.validate_every_steps": 200, "train.patience": 100}
# Seconds of training at most; on two quiet cores the steps end first. All together the demo stays below five minutes.
BUDGETS = {"vista": (1000, 150.0), "recent": (600, 30.0), "counts": (600, 20.0)}
CANDIDATES_SHOWN = 5


@dataclass(frozen=True)
class Demo:
    """What the demo made, and where."""

    report: Path
    store: Path
    runs: dict[str, Run]


def run_demo(
    out: Path, events: Path | None = None, options: PrepareOptions | None = None, console: Console | None = None
) -> Demo:
    """Everything, below ``out``. events: a real event log instead of the built-in world, with ``options`` for its
    columns.

    Raises StaleOutput when ``out`` holds the demo already.
    """
    console = console or Console()
    if out.exists() and any(out.iterdir()):
        raise StaleOutput(f"{out} is not empty: remove it, or choose another --out")
    data = _prepare(out, events, options, console)
    runs = {model: _train(out, data, model, steps, seconds, console) for model, (steps, seconds) in BUDGETS.items()}
    _say(
        console,
        "evaluate",
        *(str(out / name) for name in runs),
        "--data",
        str(data.folder),
        "--report",
        str(out / "report"),
    )
    evaluations = [evaluate_run(run, data) for run in runs.values()]
    best = best_possible(data)
    store = out / "store"
    _say(console, "summarize", str(out / "vista"), "--data", str(data.folder), "--store", str(store))
    summary = api.summarize(out / "vista", data.folder, str(store))
    console.print(f"   {summary.num_users:,} users, {summary.num_events:,} events")
    _rank(out, data, runs["vista"], store, console)
    console.print()
    console.print(render_table(evaluations, best))
    report = write_report(evaluations, out / "report", best, title="VISTA demo")
    console.print(f"report: {report}")
    return Demo(report, store, runs)


def _say(console: Console, *command: str) -> None:
    console.print(f"$ {shlex.join(('vista', *command))}", style="bold", markup=False, highlight=False, soft_wrap=True)


def _prepare(out: Path, events: Path | None, options: PrepareOptions | None, console: Console) -> PreparedData:
    if events is None:
        world = out / "world"
        _say(console, "data", "synth", WORLD, "--out", str(world))
        write_world(WORLD, world, WorldOptions())
        options = PrepareOptions(
            events=str(world / "events.parquet"),
            items=str(world / "items.parquet"),
            impressions=str(world / "impressions.parquet"),
        )
        _say(console, "prepare", options.events, "--items", str(options.items), "--impressions", str(options.impressions),
             "--out", str(out / "data"))  # fmt: skip
    else:
        options = options or PrepareOptions(events=str(events))
        _say(console, "prepare", str(events), "--out", str(out / "data"))
    prepare(options, out / "data")
    return PreparedData.open(out / "data")


def _train(out: Path, data: PreparedData, model: str, steps: int, seconds: float, console: Console) -> Run:
    settings = {"model.model": model, "train.max_steps": steps, "train.time_budget_s": seconds, "train.max_epochs": 200}
    config = resolve("tiny", overrides=settings | DEMO_SETTINGS)
    flags = [f"--set={key}={value}" for key, value in DEMO_SETTINGS.items()]
    _say(console, "train", str(data.folder), "--out", str(out / model), "--model", model, "--size", "tiny",
         "--max-steps", str(steps), "--max-epochs", "200", "--time-budget-s", f"{seconds:g}", *flags)  # fmt: skip
    train(data, out / model, config)
    return api.load(out / model)


def _rank(out: Path, data: PreparedData, run: Run, store: Path, console: Console) -> None:
    """Rank the candidates of one test request, from the store alone."""
    test = data.impressions("test")
    shown = slice(int(test.offsets[0]), min(int(test.offsets[1]), int(test.offsets[0]) + CANDIDATES_SHOWN))
    user = data.user_ids[int(test.user[0])]
    candidates = [str(item) for item in run.catalogue.decode(test.item[shown]) if item is not None]
    last_us = int(data.manifest.statistics["last_timestamp_us"])
    _say(
        console,
        "rank",
        str(out / "vista"),
        "--store",
        str(store),
        "--user",
        str(user),
        "--candidates",
        ",".join(candidates),
    )
    answer = api.rank(out / "vista", str(store), user, candidates, at_us=last_us + 1)
    for item, scores in sorted(zip(candidates, answer["scores"], strict=True), key=lambda pair: -pair[1][0]):
        console.print(f"   item {item}: {scores[0]:.3f}", highlight=False)
