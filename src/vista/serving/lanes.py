"""Queues with one worker thread each: what arrives while a batch is worked on makes up the next one.

No timer holds a request back in the hope of company: under little load each is a batch of one, under much load batches
grow by themselves.

A queue is bounded by number, and by time: a lane knows from its last batches what a unit of weight costs, and refuses
at once what it could not answer well before the deadline. Without that, a queue under too much load is as long as
deadlines are, every job begins just before its own and ends after it, and all that is worked on is in vain. For the
same reason no batch is longer than the nearest deadline in it. Work whose deadline has passed, or whose caller has
gone, is dropped when its turn comes.
"""

from __future__ import annotations

import math
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
NEWEST_SHARE = 0.2  # of the newest batch in what a unit of weight is thought to cost
WAITED_SHARE = 0.5  # of the time to a deadline that may be waited and worked away: what is left is for errors of that


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
        self,
        name: str,
        work: Callable[[list[Job[Ask]]], None],
        max_waiting: int,
        max_weight: int,
        metrics: Metrics,
        batch_weight: int = 0,
    ) -> None:
        """batch_weight: what a batch costs beside its jobs."""
        self.name, self._work, self._max_waiting, self._max_weight = name, work, max_waiting, max_weight
        self._batch_weight = batch_weight
        self._waiting: deque[Job[Ask]] = deque()
        self._ahead = 0  # weight that waits or is worked on
        self._cost_s = 0.0  # of a unit of weight
        self._changed = threading.Condition()
        self._is_open, self._metrics = True, metrics
        metrics.watch_depth(name, lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._run, name=f"vista-{name}", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, deadline_s: float, weight: int = 1) -> Future[Any]:
        """Queue a job. Raises RequestError as ``check_room`` does, and where the lane is closed."""
        job = Job(ask, deadline_s, weight)
        with self._changed:
            if not self._is_open:
                raise RequestError("the server is ending; ask another one", 503, RETRY_S)
            self.check_room(deadline_s, weight)
            self._waiting.append(job)
            self._ahead += weight
            self._changed.notify()
        return job.answer

    def check_room(self, deadline_s: float, weight: int = 0) -> None:
        """Raise RequestError where the queue is full, or too long for a deadline. An idle lane takes anything."""
        if len(self._waiting) >= self._max_waiting:
            raise RequestError(
                f"{len(self._waiting)} requests wait for {self.name!r}, which is the most; ask again later", 429,
                RETRY_S,
            )  # fmt: skip
        expected_s = (self._ahead + weight + 2 * self._batch_weight) * self._cost_s  # the batch at work, and its own
        if self._ahead and expected_s > WAITED_SHARE * (deadline_s - time.monotonic()):
            raise RequestError(
                f"an answer would take about {expected_s:.2g} s, too long for the deadline: {self.name!r} has too much "
                "to do; ask again later", 429, RETRY_S,
            )  # fmt: skip

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
            if job.answer.set_running_or_notify_cancel():  # the caller may have gone
                job.answer.set_exception(
                    RequestError("the server ended before this request had its turn", 503, RETRY_S)
                )

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            began_s, weight = time.monotonic(), sum(job.weight for job in batch)
            try:
                if batch:
                    self._work(batch)
            except Exception as error:  # whatever it is, the callers must hear of it and the thread must live
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(error)
            self._learn(weight, time.monotonic() - began_s)

    def _learn(self, weight: int, took_s: float) -> None:
        """What a batch cost, and that it is no longer ahead."""
        with self._changed:
            self._ahead -= weight
            if weight:
                newest_s = took_s / (weight + self._batch_weight)
                self._cost_s += (NEWEST_SHARE if self._cost_s else 1.0) * (newest_s - self._cost_s)

    def _next(self) -> list[Job[Ask]] | None:
        """The jobs of the next batch that are still wanted; None when the lane is closed and empty."""
        batch: list[Job[Ask]] = []
        weight = 0
        with self._changed:
            while not self._waiting and self._is_open:
                self._changed.wait()
            if not self._waiting:
                return None
            end_s = math.inf
            while self._waiting and (not batch or self._fits(weight + self._waiting[0].weight, end_s)):
                job = self._waiting.popleft()
                if not self._is_wanted(job):
                    self._ahead -= job.weight
                    continue
                batch.append(job)
                weight += job.weight
                end_s = min(end_s, job.deadline_s)
        return batch

    def _fits(self, weight: int, end_s: float) -> bool:
        """Whether a batch of so much weight is allowed, and done before a deadline."""
        took_s = (weight + self._batch_weight) * self._cost_s
        return weight <= self._max_weight and time.monotonic() + took_s <= end_s

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
