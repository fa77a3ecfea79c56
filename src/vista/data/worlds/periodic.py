"""The world of returns: things that come back, each after its own number of events. Is this one due?

Shape letters: N events, Q requests, C candidates, V things, P things of a user that return, K returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import (
    NEVER,
    Counter,
    Log,
    Requests,
    Statistics,
    draw_distinct,
    share_out,
    window_start,
)  # fmt: skip
from vista.data.worlds.membership import ThingWorld

BACKGROUND_SHARE = 0.25  # of the events at least, so that returns keep their distances


@dataclass(frozen=True, kw_only=True)
class Periodic(ThingWorld):
    """Some of a user's things return after about so many events, each after its own number; a click says: it is due.

    Due is what was last seen as long ago as the time before: the history alone says so. Some things stop returning, so
    that long ago is not due. All other events are of other things, at random.
    """

    name: ClassVar[str] = "periodic"
    formula: ClassVar[str] = (
        "p_hit if the candidate (by_category: its category) is due, else p_miss; due: it occurs twice or oftener in the"
        " history, and the events from its last occurrence to the request differ by at most tolerance gap from gap, the"
        " events between its last two"
    )

    returning: int = 24  # things of a user that return
    min_period: int = 64  # events from one return to the next, log-uniform
    max_period: int = 512
    jitter: float = 0.05  # share of its period that a return may come too early or too late
    stop_share: float = 0.5  # of the returning things that stop at a random place of the history
    tolerance: float = 0.2  # share of the last gap within which a thing is due
    p_hit: float = 0.9
    p_miss: float = 0.1

    def check(self) -> None:
        self._require_some("returning")
        self.require(1 <= self.min_period <= self.max_period, "min_period",
                     f"must lie between 1 and max_period ({self.max_period})")  # fmt: skip
        for name in ("jitter", "tolerance"):
            self.require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        self.require(0 <= self.stop_share <= 1, "stop_share", "is no share")
        most = (1 - BACKGROUND_SHARE) * self.events
        self.require(self.returning * self._most_returns <= most, "min_period", "is too short for returning "
                     f"({self.returning}) things in {self.events} events")  # fmt: skip
        for name in ("p_hit", "p_miss"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no probability")

    @property
    def _most_returns(self) -> int:
        """K, as many as there can be of one thing."""
        return 1 + math.ceil(self.events / (self.min_period * (1 - self.jitter)))

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        things = rng.permutation(self._num_things)
        own, others = things[: self.returning], things[self.returning :]
        row, place = self._returns(rng)
        num_others = self.events - len(row)
        other_place = (np.arange(num_others) + rng.random(num_others)) * (self.events / num_others)
        order = np.argsort(np.concatenate([place, other_place]), kind="stable")
        thing = np.concatenate([own[row], rng.choice(others, num_others)])[order]
        item = self._item_of(rng, thing)
        log = Log.of_views(item, self.category_of(item))
        num_known = 1 + np.sort(rng.choice(self.events - 1, self.requests, replace=False))
        is_due = self._recall(Counter.of(thing), np.arange(self._num_things), num_known[:, None])["is_due"] > 0
        is_own = np.isin(np.arange(self._num_things), own)
        groups = [(is_due & is_own, 0.5), (~is_due & is_own, 0.4), (np.broadcast_to(~is_own, is_due.shape), 0.1)]
        candidates = draw_distinct(rng, share_out(groups), self.candidates)
        return log, Requests(num_known, self._item_of(rng, candidates))

    def _returns(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which of the P things, and where in the history, 0 to N, not rounded; both of all returns."""
        shape = (self.returning, self._most_returns)
        period = self.min_period * (self.max_period / self.min_period) ** rng.random((self.returning, 1))
        gap = period * (1 + self.jitter * rng.uniform(-1, 1, shape))
        place = np.cumsum(gap, axis=1) - gap[:, :1] * rng.random((self.returning, 1))
        stops = rng.random(self.returning) < self.stop_share
        end = np.where(stops, rng.random(self.returning) * self.events, self.events)
        row, column = np.nonzero(place < end[:, None])
        return row, place[row, column]

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """Of the candidate's thing: occurrences, at most 2; age: events since the last; is_due."""
        known = requests.num_known[:, None]
        window = known - window_start(requests.num_known, last_events)[:, None]
        recalled = self._recall(Counter.of(self._thing_of(log.item)), self._thing_of(requests.item), known, window)
        return {name: recalled[name] for name in ("occurrences", "age", "is_due")}

    def _recall(
        self, counter: Counter, thing: np.ndarray, known: np.ndarray, window: np.ndarray | None = None
    ) -> Statistics:
        """What the last ``window`` (Q, 1) events before ``known`` (Q, 1), or all, say of each thing: age and gap
        (NEVER where there is none), occurrences (at most 2) and is_due. """  # fmt: skip
        window = known if window is None else window
        age = counter.age(thing, known)
        age = np.where(age <= window, age, NEVER)
        gap = counter.age(thing, np.where(age > 0, known - age, 0))
        gap = np.where(age + gap <= window, gap, NEVER)
        is_due = (gap > 0) & (np.abs(age - gap) <= self.tolerance * gap)
        return {
            "age": age,
            "gap": gap,
            "occurrences": (age > 0).astype(np.int64) + (gap > 0),
            "is_due": is_due.astype(np.int64),
        }

    def probability(self, statistics: Statistics) -> np.ndarray:
        return np.where(statistics["is_due"] > 0, self.p_hit, self.p_miss)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """age_events: events from the last occurrence of the candidate's thing to the request; gap_events: between the
        last two; -1 where there are none. """  # fmt: skip
        counter, thing = Counter.of(self._thing_of(log.item)), self._thing_of(requests.item)
        recalled = self._recall(counter, thing, requests.num_known[:, None])
        return {"age_events": recalled["age"], "gap_events": recalled["gap"]}
