"""The runs of a benchmark, one after another: cached, resumable, within a budget.

A job has a folder, named after all that its numbers depend on, and leaves there a ``cell.json``. A job whose cell is
there is not run again; one that was interrupted goes on as its own training does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vista.benchmark.machine import DISTRIBUTION
from vista.errors import DataError

KEY_DIGITS = 12


class HasScores(Protocol):
    def scores(self) -> str: ...


C = TypeVar("C", bound=HasScores)


@dataclass(frozen=True)
class Job(Generic[C]):
    """One run. name: of its set; label: what is said of it; read: a cell from JSON; run: makes the cell, writes it."""

    name: str
    label: str
    folder: Path
    read: Callable[[dict[str, Any]], C]
    run: Callable[[], C]

    def cached(self) -> C | None:
        """The cell, where it is there. Raises DataError where it cannot be read."""
        path = self.folder / "cell.json"
        if not path.exists():
            return None
        try:
            return self.read(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a cell of a benchmark ({error!r}); remove it, and it is run again") from error


def run_jobs(
    jobs: Iterable[Job[C]], num_jobs: int, time_budget_s: float, say: Callable[[str], None]
) -> Iterator[tuple[str, C]]:
    """Run what is not cached; name of the set and cell. None is begun when the budget (0: no limit) is used up."""
    started = time.monotonic()
    for number, job in enumerate(jobs, 1):
        place = f"[{number}/{num_jobs}] {job.label}"
        cell = job.cached()
        if cell is None and 0 < time_budget_s <= time.monotonic() - started:
            say(f"{place}: left out, the budget is used up")
            continue
        if cell is None:
            say(place)
            cell = job.run()
        say(f"{place}: {cell.scores()}")
        yield job.name, cell


def content_key(content: dict[str, Any]) -> str:
    """The hash of all that a cell's numbers depend on, this package's version included."""
    content = content | {"vista": version(DISTRIBUTION)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
