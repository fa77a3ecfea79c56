"""The cells of leave-one-out: one model, one seed, trained and ranked (`vista.benchmark.jobs`).

    OUT/ENTRY-SEED-KEY/         what training leaves (`training`)
    OUT/ENTRY-SEED-KEY/cell.json    what came out

Jobs run seed by seed, so that whatever the budget, all models have had the same number of runs, give or take one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vista.benchmark.jobs import Job, content_key, run_jobs
from vista.benchmark.leave_one_out.entries import Entry
from vista.benchmark.leave_one_out.ranking import by_popularity, rank_all
from vista.benchmark.leave_one_out.split import LeaveOneOut
from vista.benchmark.leave_one_out.training import NextItemTrainer
from vista.checkpoint import write_text
from vista.data.sequences import Sequences
from vista.errors import ConfigError
from vista.evaluation.metrics import Metrics


@dataclass(frozen=True)
class NextItemCell:
    """What came of one model and seed.

    metrics: of the test part, by the weights of the best epoch; curve: one record per epoch; seconds: of training.
    """

    entry: str
    seed: int
    metrics: Metrics
    curve: tuple[dict[str, float], ...] = ()
    best_epoch: int = 0
    seconds: float = 0.0
    num_weights: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NextItemCell:
        return cls(**{**values, "curve": tuple(values["curve"])})

    def scores(self) -> str:
        """What one line can say of it."""
        told = " ".join(f"{name.upper()} {self.metrics[name]:.4f}" for name in ("hr@10", "ndcg@10", "hr@50", "mrr"))
        return told + (f", epoch {self.best_epoch} of {len(self.curve)}" if self.curve else "")


@dataclass(frozen=True)
class LeaveOneOutPlan:
    """What is to be run: every entry with every seed on one log."""

    sequences: Sequences
    entries: Sequence[Entry]
    seeds: Sequence[int]
    overrides: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for no entry at all."""
        if not self.entries:
            raise ConfigError("--models: name at least one entry, as in sasrec,vista, or leave it out")

    def jobs(self, out: Path) -> Iterator[Job[NextItemCell]]:
        """Seed by seed; what has no seed, once."""
        for number, seed in enumerate(self.seeds):
            for entry in self.entries:
                if entry.is_trained or not number:
                    yield self._job(entry, seed if entry.is_trained else 0, out)

    @property
    def num_jobs(self) -> int:
        return len(list(self.jobs(Path())))

    def folder(self, entry: Entry, seed: int, out: Path) -> Path:
        """Where a run is kept, named after all that its numbers depend on."""
        content = {"data": self.sequences.fingerprint, "settings": entry.identity(seed, self.overrides)}
        return out / f"{entry.name}-{seed}-{content_key(content)}"

    def _job(self, entry: Entry, seed: int, out: Path) -> Job[NextItemCell]:
        folder = self.folder(entry, seed, out)
        label = f"{entry.name}, seed {seed}" if entry.is_trained else entry.name
        return Job("", label, folder, NextItemCell.from_json, lambda: _run(self, entry, seed, folder))


def run_leave_one_out(
    plan: LeaveOneOutPlan, out: Path, time_budget_s: float = 0.0, say: Callable[[str], None] = print
) -> list[NextItemCell]:
    """Run what is not cached. No run is begun when the budget (0: none) is used up."""
    for entry in plan.entries:
        entry.config(0, plan.overrides)  # a wrong setting is told before hours of work, not after
    return [cell for _, cell in run_jobs(plan.jobs(out), plan.num_jobs, time_budget_s, say)]


def _run(plan: LeaveOneOutPlan, entry: Entry, seed: int, folder: Path) -> NextItemCell:
    config = entry.config(seed, plan.overrides)
    if entry.is_trained:
        trainer = NextItemTrainer(plan.sequences, config, folder, plan.device)
        trainer.run()
        place = trainer.place
        cell = NextItemCell(
            entry.name, seed, trainer.measure_best(), tuple(place.curve), int(place.best["epoch"]), place.elapsed_s,
            sum(p.numel() for p in trainer.weights().values()),
        )  # fmt: skip
    else:
        folder.mkdir(parents=True, exist_ok=True)
        split = LeaveOneOut(plan.sequences, config.train.length, None)
        cell = NextItemCell(entry.name, seed, rank_all(split, "test", by_popularity(split)))
    write_text(folder / "cell.json", json.dumps(asdict(cell), indent=1, allow_nan=False) + "\n")
    (folder / "training.safetensors").unlink(missing_ok=True)
    return cell
