"""Queues with one worker thread each: what arrives while a batch is worked on makes up the next one.

No timer holds a request back in the hope of company: under little load each is a batch of one, under much load batches
grow by themselves. A queue is bounded. Work whose deadline has passed, or whose caller has gone, is dropped when its
turn comes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vista.errors import RequestError
from vista.serving.metrics import Metrics

Ask = TypeVar("Ask")
RETRY_S = 1  # a full queue has moved on by then: no deadline is much longer


@dataclass(eq=False)
class Job(Generic[Ask]):
    """What is asked, until when (``time.monotonic``), how heavy it is, and where the answer goes."""

    ask: Ask
    deadline_s: float
    weight: int = 1
    answer: Future[Any] = field(default_factory=Future)
    queued_s: float = field(default_factory=time.monotonic)


class Lane(Generic[Ask]):
    """``work`` gets batches of jobs, in a thread of its own, and answers each."""

    def __init__(
        self, name: str, work: Callable[[list[Job[Ask]]], None], max_waiting: int, max_weight: int, metrics: Metrics
    ) -> None:
        self.name, self._work, self._max_waiting, self._max_weight = name, work, max_waiting, max_weight
        self._waiting: deque[Job[Ask]] = deque()
        self._changed = threading.Condition()
        self._is_open, self._metrics = True, metrics
        metrics.watch_depth(name, lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._run, name=f"vista-{name}", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, deadline_s: float, weight: int = 1) -> Future[Any]:
        """Queue a job. Raises RequestError where the queue is full or closed."""
        job = Job(ask, deadline_s, weight)
        with self._changed:
            if not self._is_open:
                raise RequestError("the server is ending; ask another one", 503, RETRY_S)
            if len(self._waiting) >= self._max_waiting:
                raise RequestError(
                    f"{len(self._waiting)} requests wait for {self.name!r}, which is the most; ask again later", 429,
                    RETRY_S,
                )  # fmt: skip
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    def close(self, wait_s: float) -> None:
        """Finish what waits, for at most so long; then fail the rest."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join(wait_s)
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            job.answer.set_exception(RequestError("the server ended before this request had its turn", 503, RETRY_S))

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if not batch:
                continue
            try:
                self._work(batch)
            except Exception as error:  # whatever it is, the callers must hear of it and the thread must live
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(error)

    def _next(self) -> list[Job[Ask]] | None:
        """The jobs of the next batch that are still wanted; None when the lane is closed and empty."""
        batch: list[Job[Ask]] = []
        weight = 0
        with self._changed:
            while not self._waiting and self._is_open:
                self._changed.wait()
            if not self._waiting:
                return None
            while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_weight):
                batch.append(self._waiting.popleft())
                weight += batch[-1].weight
        return [job for job in batch if self._is_wanted(job)]

    def _is_wanted(self, job: Job[Ask]) -> bool:
        is_wanted = job.answer.set_running_or_notify_cancel()
        if is_wanted and job.deadline_s < time.monotonic():
            job.answer.set_exception(too_late())
            is_wanted = False
        if not is_wanted:
            self._metrics.dropped.labels(self.name).inc()
        return is_wanted


def too_late() -> RequestError:
    return RequestError("the deadline passed before there was an answer; allow more time, or ask for less", 504)
