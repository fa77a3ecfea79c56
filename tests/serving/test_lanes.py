"""Queues of the server: what they take, what they refuse, and how much work is in vain under too much load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from vista.errors import RequestError
from vista.serving.lanes import Job, Lane
from vista.serving.metrics import Metrics

FAR_S = 1e9


@contextmanager
def lane(work: Callable[[list[Job[Any]]], None], max_waiting: int = 1000, max_weight: int = 1000) -> Iterator[Lane]:
    made: Lane[Any] = Lane("test", work, max_waiting, max_weight, Metrics())
    yield made
    made.close(10)


def slowly(unit_s: float, sizes: list[int] | None = None) -> Callable[[list[Job[Any]]], None]:
    """Work that takes so long per unit of weight."""

    def work(jobs: list[Job[Any]]) -> None:
        if sizes is not None:
            sizes.append(len(jobs))
        time.sleep(unit_s * sum(job.weight for job in jobs))
        for job in jobs:
            job.answer.set_result(time.monotonic())

    return work


def now() -> float:
    return time.monotonic()


def test_under_too_much_load_most_work_is_not_in_vain():
    """Four times what the lane can do: who is taken is answered in time, and the lane does nearly all it can."""
    taken: list[tuple[float, Future[float]]] = []
    refused: list[RequestError] = []
    span_s, unit_s = 1.6, 0.02
    with lane(slowly(unit_s)) as made:
        end_s = now() + span_s
        while now() < end_s:
            deadline_s = now() + 0.3
            try:
                taken.append((deadline_s, made.submit(None, deadline_s)))
            except RequestError as error:
                refused.append(error)
            time.sleep(unit_s / 4)
        answers = [(deadline_s, future.exception(10), future) for deadline_s, future in taken]
    in_time = [future for deadline_s, error, future in answers if error is None and future.result() <= deadline_s]
    assert {(error.status, error.retry_after_s) for error in refused} == {(429, 1)}
    assert len(refused) > len(taken)
    assert len(in_time) >= 0.8 * len(taken)
    assert len(in_time) >= 0.4 * span_s / unit_s


def test_an_idle_lane_takes_anything_however_slow_it_was():
    with lane(slowly(0.3)) as made:
        made.submit(None, now() + FAR_S).result(10)
        time.sleep(0.05)  # the batch is learned from when it is over
        assert made.submit(None, now() + 0.1).exception(10) is None


def test_a_batch_is_not_longer_than_the_nearest_deadline_in_it():
    sizes: list[int] = []
    with lane(slowly(0.01, sizes)) as made:
        made.submit(None, now() + FAR_S, 20).result(10)  # 0.2 s: the lane learns, and the others wait meanwhile
        first = made.submit(None, now() + FAR_S, 20)
        time.sleep(0.05)
        futures = [made.submit(None, now() + 1.0, 5) for _ in range(4)]
        hurried = [made.submit(None, now() + FAR_S, 50) for _ in range(4)]
        for future in [first, *futures, *hurried]:
            assert future.exception(10) is None
    assert sizes[:2] == [1, 1]
    assert sizes[2] in (4, 5, 6), "the four that are in a hurry, and no more than fits before their deadline"
    assert sum(sizes) == 10


def test_a_lane_closes_though_a_caller_has_gone():
    """And who still waits is told."""
    free = threading.Event()

    def work(jobs: list[Job[Any]]) -> None:
        free.wait(10)
        for job in jobs:
            job.answer.set_result(None)

    made: Lane[Any] = Lane("test", work, 10, 1, Metrics())
    futures = [made.submit(None, now() + FAR_S) for _ in range(3)]
    time.sleep(0.05)
    assert futures[1].cancel()
    made.close(0.05)
    with pytest.raises(RequestError, match="before this request had its turn"):
        futures[2].result(0)
    free.set()
    assert futures[0].result(10) is None
