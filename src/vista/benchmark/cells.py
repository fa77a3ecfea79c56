"""The cells of the lifelong benchmark: one model, one seed, one set, trained and evaluated (`vista.benchmark.jobs`).

    OUT/SET/data/                   the prepared log
    OUT/SET/ENTRY-SEED-KEY/run/     a run folder as `vista train` writes it
    OUT/SET/ENTRY-SEED-KEY/cell.json    what came out

The key is a hash of data, settings and package version. A cell that is there is not run again; one whose training was
interrupted goes on from its checkpoint.
Cells run seed by seed, so that whatever the budget, all models have had the same number of runs, give or take one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vista.benchmark.entries import Entry
from vista.benchmark.jobs import Job, content_key, run_jobs
from vista.benchmark.sets import BenchmarkSet
from vista.checkpoint import Run, load_run, write_text
from vista.config import Config
from vista.data.histories import PreparedData
from vista.evaluation.evaluate import evaluate
from vista.evaluation.results import Evaluation
from vista.jobs.fold import summarize_users
from vista.models.vista import SequenceModel
from vista.store.record import encode
from vista.training.loop import train

HISTORY_BYTES = 14  # of one event in prepared data: what a model without a summary must have at hand of each
NO_LIMIT = 2**62
SIZED_USERS = 8  # the longest histories, of which records are made to see how large they are


@dataclass(frozen=True)
class Cell:
    """What came of one model, seed and set.

    seconds: of training. steps: optimizer steps. num_weights: of the network. bytes_per_user: what must be at hand of
    a user with a long history to rank for them: the tokens record, recent events included, or the raw events read.
    """

    entry: str
    seed: int
    evaluation: Evaluation
    seconds: float
    steps: int
    num_weights: int
    bytes_per_user: int

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cell:
        return cls(**{**values, "evaluation": Evaluation.from_json(values["evaluation"])})

    def scores(self) -> str:
        """What one line can say of it."""
        metrics = self.evaluation.metrics
        return "; ".join(f"{task} NE {m['ne']:.4f} AUC {m['auc']:.4f}" for task, m in metrics.items())


@dataclass(frozen=True)
class Plan:
    """What is to be run: every entry with every seed on every set, in steps of the same size.

    device: where models compute; runs are cached by their content alone, wherever they were trained.
    """

    sets: Sequence[BenchmarkSet]
    entries: Sequence[Entry]
    seeds: Sequence[int]
    size: str = "tiny"
    training: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def num_cells(self) -> int:
        return len(self.sets) * len(self.entries) * len(self.seeds)

    def order(self) -> Iterator[tuple[BenchmarkSet, Entry, int]]:
        for seed in self.seeds:
            for one in self.sets:
                for entry in self.entries:
                    yield one, entry, seed


def run_plan(
    plan: Plan, out: Path, time_budget_s: float = 0.0, say: Callable[[str], None] = print
) -> dict[str, list[Cell]]:
    """Run what is not cached; the cells by name of the set. No cell is begun when the budget (0: none) is used up."""
    for entry in plan.entries:
        entry.config(plan.size, 0, plan.training)  # a wrong setting is told before hours of work, not after
    cells: dict[str, list[Cell]] = {one.name: [] for one in plan.sets}
    todo = (_job(plan, one, entry, seed, out) for one, entry, seed in plan.order())
    for name, cell in run_jobs(todo, plan.num_cells, time_budget_s, say):
        cells[name].append(cell)
    return cells


def _job(plan: Plan, one: BenchmarkSet, entry: Entry, seed: int, out: Path) -> Job[Cell]:
    data = one.open(out / one.name)
    config = entry.config(plan.size, seed, plan.training)
    folder = cell_folder(out, one, data, entry, config)
    label = f"{one.name}, {entry.name}, seed {seed}"
    place = plan.device
    return Job(one.name, label, folder, Cell.from_json, lambda: _run_cell(data, config, entry, seed, folder, place))


def cell_folder(out: Path, one: BenchmarkSet, data: PreparedData, entry: Entry, config: Config) -> Path:
    """Where a cell is kept; named after all that its numbers depend on."""
    key = content_key({"data": data.manifest.checksums, "config": json.loads(config.to_json())})
    return out / one.name / f"{entry.name}-{config.train.seed}-{key}"


def _run_cell(data: PreparedData, config: Config, entry: Entry, seed: int, folder: Path, device: str) -> Cell:
    """Train, or go on training, and evaluate."""
    run_folder = folder / "run"
    can_resume = (run_folder / "training.safetensors").exists()
    if not can_resume:
        shutil.rmtree(run_folder, ignore_errors=True)
    train(data, run_folder, config, resume=can_resume, device=device)
    run = load_run(run_folder, device)
    evaluation = replace(evaluate(run, data), model=entry.name)
    last = evaluation.learning_curve[-1] if evaluation.learning_curve else {"elapsed_s": 0.0, "step": 0}
    num_weights = sum(p.numel() for p in run.model.parameters())
    cell = Cell(
        entry.name, seed, evaluation, float(last["elapsed_s"]), int(last["step"]), num_weights,
        bytes_per_user(run, data),
    )  # fmt: skip
    values = asdict(cell) | {"evaluation": evaluation.to_json()}
    write_text(folder / "cell.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
    (run_folder / "training.safetensors").unlink(missing_ok=True)  # as large as the model three times; no use any more
    return cell


def bytes_per_user(run: Run, data: PreparedData, codec: str = "int8") -> int:
    """What must be at hand of a user with a long history: raw events, a tokens record of this codec, or both."""
    lengths, model = data.histories.lengths(), run.config.model
    num_bytes = 0
    if model.with_counts or not isinstance(run.model, SequenceModel):
        window = (model.count_last_events or NO_LIMIT) if model.with_counts else model.raw_events
        num_bytes = HISTORY_BYTES * min(window, int(lengths.max()))
    if isinstance(run.model, SequenceModel):
        longest = np.argsort(lengths)[::-1][:SIZED_USERS].copy()
        records = summarize_users(run.model, data.histories, longest, data.user_ids[longest], run.version)
        num_bytes += max(len(encode(record, codec)) for record in records if record.kind == "tokens")
    return num_bytes
