"""The world of counts: how often did this item, or one of its category, occur in the whole history?

Shape letters: N events, Q requests, C candidates, U things a user touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import (
    Counter,
    Log,
    Requests,
    Statistics,
    draw_distinct,
    share_out,
    sigmoid,
    window_start,
)  # fmt: skip
from vista.data.worlds.membership import ThingWorld


@dataclass(frozen=True, kw_only=True)
class Counting(ThingWorld):
    """Each user touches many things, some up to ``most_often`` times as often as others; a click says: how often.

    A user keeps to the same things at the same rates all along, and those rates are log-uniform: small counts are asked
    about as often as large ones, and the last events hold nothing that older ones do not, only less of it.
    """

    name: ClassVar[str] = "counting"
    formula: ClassVar[str] = (
        "sigmoid(bias + weight log2(1 + events with the candidate (by_category: its category) before the request))"
    )

    touched: int = 128  # different things of a user
    most_often: float = 128.0  # the most touched things come so many times as often as the least touched ones
    untouched_share: float = 0.1  # of the candidates
    bias: float = -6.0
    weight: float = 2.0

    def check(self) -> None:
        self._require_some("touched")
        self.require(self.most_often >= 1, "most_often", "must be at least 1")
        self.require(0 < self.untouched_share < 1, "untouched_share", "must lie between 0 and 1, both excluded")

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        own = rng.permutation(self._num_things)[: self.touched]
        rate = np.cumsum(self.most_often ** rng.random(self.touched))
        thing = own[np.searchsorted(rate, rng.random(self.events) * rate[-1], side="right")]
        item = self._item_of(rng, thing)
        num_known = 1 + np.sort(rng.choice(self.events - 1, self.requests, replace=False))
        is_touched = Counter.of(thing).before(np.arange(self._num_things), num_known[:, None]) > 0
        groups = [(is_touched, 1 - self.untouched_share), (~is_touched, self.untouched_share)]
        candidates = draw_distinct(rng, share_out(groups), self.candidates)
        return Log.of_views(item, self.category_of(item)), Requests(num_known, self._item_of(rng, candidates))

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """touches: events with the candidate's thing."""
        start = window_start(requests.num_known, last_events)[:, None]
        counter = Counter.of(self._thing_of(log.item))
        return {"touches": counter.within(self._thing_of(requests.item), start, requests.num_known[:, None])}

    def probability(self, statistics: Statistics) -> np.ndarray:
        return sigmoid(self.bias + self.weight * np.log2(1 + statistics["touches"]))

    def details(self, log: Log, requests: Requests) -> Statistics:
        """touches: events with the candidate's thing in the history. age_events: events since the last one, -1 without
        one. """  # fmt: skip
        age = Counter.of(self._thing_of(log.item)).age(self._thing_of(requests.item), requests.num_known[:, None])
        return self.statistics(log, requests) | {"age_events": age}
