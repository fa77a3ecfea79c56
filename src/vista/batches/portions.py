"""A step shared out: over the processes that train together, and in each over portions computed one after another.

Every process walks the same plans and builds its own lanes alone, from histories that are mapped, not copied. A portion
weighs as much as it holds of the whole step, so that the gradients of all portions add up to that of the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from vista.batches.builder import BatchBuilder, Step
from vista.batches.plans import Feed, Plan
from vista.batches.timelines import TimelineWalk

LOOK_S = 0.1  # how soon a thread that waits for room sees that nobody wants its batches any more

Value = TypeVar("Value")


@dataclass(frozen=True)
class Portion:
    """Lanes of a step. impressions, windows: how much of the whole step's is in here, 0 to 1."""

    step: Step
    impressions: float = 1.0
    windows: float = 1.0


@dataclass(frozen=True)
class SharedStep:
    """What one process computes of a step. is_empty: no process has an impression to learn from."""

    portions: list[Portion]
    is_empty: bool = False
    position: dict[str, Any] = field(default_factory=dict)  # of the walk after the step

    def to(self, device: torch.device) -> SharedStep:
        """The same with its batches there."""
        return replace(self, portions=[replace(portion, step=portion.step.to(device)) for portion in self.portions])


class Sharer:
    """Plans to what one process computes of them."""

    def __init__(self, feed: Feed, rank: int = 0, portions: int = 1) -> None:
        self.feed, self.rank, self.num_portions = feed, rank, portions
        self.builder = BatchBuilder(feed)

    def steps(self, walk: TimelineWalk) -> Iterator[SharedStep]:
        """The steps of a walk, built one by one."""
        for plan in walk.plans():
            yield self.share(plan)

    def share(self, plan: Plan) -> SharedStep:
        """The portions of this process, each of whole lanes and of about the same work."""
        num_impressions = self._num_impressions(plan)
        mine = [lane for lane, process in enumerate(plan.process) if process == self.rank]
        work = np.array([self.feed.work(plan.stretches[lane]) for lane in mine])
        portion_of = share_out(work, self.num_portions)
        portions = []
        for number in range(self.num_portions):
            lanes = [lane for lane, portion in zip(mine, portion_of, strict=True) if portion == number]
            if lanes:
                part = plan if len(lanes) == len(plan.stretches) else plan.lanes(lanes)
                weight = self._num_impressions(part) / max(num_impressions, 1)
                portions.append(Portion(self.builder.step(part), weight, part.num_windows / max(plan.num_windows, 1)))
        return SharedStep(portions, num_impressions == 0, plan.position)

    def _num_impressions(self, plan: Plan) -> int:
        first, end = (
            self.feed.impressions.offsets[[getattr(s, name) for s in plan.stretches]].astype(np.int64)
            for name in ("first_request", "end_request")
        )
        return int((end - first).sum())


def share_out(work: np.ndarray, number: int) -> np.ndarray:
    """Which of ``number`` takes each piece of work (n,): the largest pieces first, each to whoever has least."""
    owner, load = np.zeros(len(work), np.int64), np.zeros(number)
    for piece in np.argsort(-work, kind="stable"):
        owner[piece] = load.argmin()
        load[owner[piece]] += work[piece]
    return owner


def ahead(values: Iterator[Value], number: int) -> Generator[Value, None, None]:
    """The same values, up to ``number`` of them made ahead in a thread; with 0 each is made when asked for.

    numpy and torch let go of the interpreter while they copy and compute, so that a second core builds batches while
    the first trains. An error of ``values`` is raised where its value is asked for.
    """
    if number == 0:
        yield from values
        return
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(number)
    unwanted = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not unwanted.is_set():
            try:
                return ready.put(entry, timeout=LOOK_S)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for value in values:
                put((True, value))
                if unwanted.is_set():
                    return
            put((False, None))
        except BaseException as error:  # whatever it is, it belongs to whoever asks
            put((False, error))

    thread = threading.Thread(target=make, name="batches ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_value, value = ready.get()
            if not is_value:
                if value is not None:
                    raise value
                return
            yield value
    finally:
        unwanted.set()
        thread.join()
