"""The whole system in one go: an event log to histories, models, a store, a ranking, a table and a report.

Each step is the Python call behind the command of the same name, and prints that command, so that whoever watches can
do it again with a log of their own. The last command, which serves what was made, is printed and left to them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vista import api
from vista.checkpoint import Run
from vista.config import resolve
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare, summary_lines
from vista.data.worlds import WorldOptions, write_world
from vista.errors import StaleOutput
from vista.evaluation.evaluate import best_possible
from vista.evaluation.evaluate import evaluate as evaluate_run
from vista.evaluation.report import write_report
from vista.evaluation.tables import render_table
from vista.training.loop import train

WORLD, WORLD_OPTIONS = "lifelong", WorldOptions(requests=128)
SIZE = "tiny"
SETTINGS: dict[str, Any] = {
    "model.num_seeds": 64, "model.sketch_slots": 1024, "train.max_epochs": 1000, "train.validate_every_steps": 200,
}  # fmt: skip
# Steps and seconds of training at most; on two quiet cores the steps end first, and the demo stays below five minutes.
BUDGETS = {"vista": (800, 200), "recent": (600, 30), "counts": (600, 20)}
THREADS = 1  # of training: at this size two are hardly faster on a quiet machine, and half as fast on a busy one
MAX_CANDIDATES_SHOWN = 6
US_PER_S = 1_000_000
PAGE = "http://127.0.0.1:8000/ui"  # as `vista serve` has it where it is not told otherwise


@dataclass(frozen=True)
class Demo:
    """What the demo made, and where."""

    report: Path
    store: Path
    runs: dict[str, Run]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does; the tests do less."""

    world: WorldOptions = WORLD_OPTIONS
    steps: int | None = None  # of training, instead of BUDGETS


def run_demo(
    out: Path, options: PrepareOptions | None = None, size: DemoSize | None = None, console: Console | None = None
) -> Demo:
    """Everything, below ``out``. options: a real event log and its columns, instead of the built-in world.

    Raises StaleOutput when ``out`` is not empty, and whatever the single steps raise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StaleOutput(f"{out} is there already: remove it, or choose another --out")
    show = _Show(console or Console())
    size = size or DemoSize()
    data = _prepare(out, options or _make_world(out, size.world, show), show)
    runs = {model: _train(out, data, model, size.steps, show) for model in BUDGETS}
    store = out / "store"
    show.command("summarize", out / "vista", "--data", data.folder, "--store", store)
    done = api.summarize(out / "vista", data.folder, str(store))
    show.line(
        f"{done.num_users:,} users, {done.num_events:,} events: {runs['vista'].config.model.num_seeds} tokens each"
    )
    _rank(out, data, runs["vista"], store, show)
    show.command("evaluate", *(out / m for m in runs), "--data", data.folder, "--report", out / "report")
    evaluations = [evaluate_run(run, data) for run in runs.values()]
    best = best_possible(data)
    show.console.print(render_table(evaluations, best))
    report = write_report(evaluations, out / "report", best, title="VISTA demo")
    show.line(f"report: {report}")
    show.command("serve", "--run", out / "vista", "--store", store, "--data", data.folder)
    show.line(f"serves it; the page to look at users and their rankings is then {PAGE}")
    return Demo(report, store, runs)


@dataclass(frozen=True)
class _Show:
    """What whoever watches sees: the commands, and what came of them."""

    console: Console

    def command(self, *words: object) -> None:
        text = shlex.join(("vista", *map(str, words)))
        self.console.print(f"\n$ {text}", style="bold", markup=False, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _make_world(out: Path, world: WorldOptions, show: _Show) -> PrepareOptions:
    """Write the built-in world; how to prepare it."""
    folder = out / "world"
    show.command("data", "synth", WORLD, "--requests", world.requests, "--out", folder)
    described = write_world(WORLD, folder, world)
    show.line(f"{described['num_events']:,} events, {described['num_impressions']:,} impressions")
    show.line(f"P(click) = {described['formula']}")
    events, items, impressions = (str(folder / f"{name}.parquet") for name in ("events", "items", "impressions"))
    return PrepareOptions(events, items, impressions)


def _prepare(out: Path, options: PrepareOptions, show: _Show) -> PreparedData:
    given = {"--items": options.items, "--impressions": options.impressions, "--burst-column": options.burst_column}
    columns = {f"--{part}-column": getattr(options, f"{part}_column") for part in ("user", "item", "timestamp")}
    given |= {
        flag: name for flag, name in columns.items() if name != getattr(PrepareOptions, flag[2:].replace("-", "_"))
    }
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    show.command("prepare", options.events, *flags, "--out", out / "data")
    for line in summary_lines(prepare(options, out / "data")):
        show.line(line)
    return PreparedData.open(out / "data")


def _train(out: Path, data: PreparedData, model: str, steps: int | None, show: _Show) -> Run:
    max_steps, seconds = BUDGETS[model]
    given = {"train.max_steps": steps or max_steps, "train.time_budget_s": float(seconds)}
    config = resolve(SIZE, overrides={"model.model": model} | given | SETTINGS)
    flags = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    show.command("train", data.folder, "--out", out / model, "--model", model, "--size", SIZE,
                 "--max-steps", max_steps, "--time-budget-s", seconds, "--threads", THREADS, *flags)  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        train(data, out / model, config)
    finally:
        torch.set_num_threads(before)
    return api.load(out / model)


def _rank(out: Path, data: PreparedData, run: Run, store: Path, show: _Show) -> None:
    """Rank the candidates of the last test request, from the store alone."""
    test = data.impressions("test")
    last = int(test.timestamp_us.argmax())
    shown = test.item[test.offsets[last] : test.offsets[last + 1]][:MAX_CANDIDATES_SHOWN]
    user = data.user_ids[int(test.user[last])]
    candidates = [item for item in run.catalogue.decode(shown) if item is not None]
    at_s = int(data.manifest.statistics["last_timestamp_us"]) // US_PER_S + 1  # just after the last event
    moment = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    names = ",".join(map(str, candidates))
    show.command("rank", out / "vista", "--store", store, "--user", user, "--candidates", names, "--at", moment)
    answer = api.rank(out / "vista", str(store), user, candidates, at_us=at_s * US_PER_S)
    for item, score in sorted(zip(candidates, answer["scores"], strict=True), key=lambda pair: -pair[1]):
        show.line(f"item {item}: {score:.3f}")
