"""Worlds of things, items or categories: ``membership``, was this one ever in the history?

Shape letters: N events, Q requests, C candidates, U things a user touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import Counter, Log, Requests, Statistics, World, draw_distinct, share_out, window_start


@dataclass(frozen=True, kw_only=True)
class ThingWorld(World):
    """The question is about things: items or, with ``by_category``, categories, of which any item may come."""

    by_category: bool = False

    @property
    def _num_things(self) -> int:
        return self.categories if self.by_category else self.items

    def _thing_of(self, item: np.ndarray) -> np.ndarray:
        return self.category_of(item) if self.by_category else item

    def _item_of(self, rng: np.random.Generator, thing: np.ndarray) -> np.ndarray:
        return self.pick_items(rng, thing) if self.by_category else thing

    def _require_some(self, setting: str) -> None:
        """Refuse a number of the user's things that is none, or leaves too few others to be shown."""
        most = self._num_things - self.candidates
        things = "categories" if self.by_category else "items"
        is_fine = 1 <= getattr(self, setting) <= most
        self.require(is_fine, setting, f"must lie between 1 and {things} - candidates ({most})")


@dataclass(frozen=True, kw_only=True)
class Membership(ThingWorld):
    """Each user touches a few things again and again, some much oftener than others; a click says: touched before.

    A user keeps to the same things, so the answer does not depend on how long the history is.
    """

    name: ClassVar[str] = "membership"
    formula: ClassVar[str] = (
        "p_hit if the candidate (by_category: its category) occurs in the history before the request, else p_miss"
    )

    items: int = 512
    categories: int = 16
    touched: int = 48  # different things of a user
    zipf: float = 1.0  # the thing of rank r is touched in proportion to r^-zipf
    copies: int = 0  # of the events: one thing again and again, half-way through the others and before all requests
    p_hit: float = 1.0
    p_miss: float = 0.0

    def check(self) -> None:
        self._require_some("touched")
        most = self.events - 2 * self.requests
        self.require(
            0 <= self.copies <= max(most, 0), "copies", f"must lie between 0 and events - 2 x requests ({most})"
        )
        self.require(self.zipf >= 0, "zipf", "must not be negative")
        for name in ("p_hit", "p_miss"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no probability")

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        own = rng.permutation(self._num_things)[: self.touched]
        weight = np.cumsum(np.arange(1, self.touched + 1) ** -self.zipf)
        place = rng.random(self.events - self.copies) * weight[-1]
        half = len(place) // 2 if self.copies else 0
        thing = np.insert(own[np.searchsorted(weight, place, side="right")], half, np.repeat(own[0], self.copies))
        item = self._item_of(rng, thing)
        log = Log.of_views(item, self.category_of(item))
        first = half + self.copies if self.copies else 1
        num_known = first + np.sort(rng.choice(self.events - first, self.requests, replace=False))
        is_touched = Counter.of(thing).before(np.arange(self._num_things), num_known[:, None]) > 0
        candidates = draw_distinct(rng, share_out([(is_touched, 0.5), (~is_touched, 0.5)]), self.candidates)
        return log, Requests(num_known, self._item_of(rng, candidates))

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """touches: events with the candidate's thing."""
        start = window_start(requests.num_known, last_events)[:, None]
        counter = Counter.of(self._thing_of(log.item))
        return {"touches": counter.within(self._thing_of(requests.item), start, requests.num_known[:, None])}

    def probability(self, statistics: Statistics) -> np.ndarray:
        return np.where(statistics["touches"] > 0, self.p_hit, self.p_miss)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """touches: events with the candidate's thing in the history. age_events: events since the last one, -1 without
        one. is_rare: whether it belongs to the half touched least of the user's things known at the request.
        """
        things, candidate = self._thing_of(log.item), self._thing_of(requests.item)
        counter, known = Counter.of(things), requests.num_known[:, None]
        touches = counter.before(candidate, known)
        own = np.sort(counter.before(np.unique(things), known), axis=1)
        num_untouched, num_own = (own == 0).sum(1), own.shape[1]
        middle = num_untouched + (num_own - num_untouched - 1) // 2
        median = np.take_along_axis(own, middle[:, None], 1)
        is_rare = ((touches > 0) & (touches <= median)).astype(np.int64)
        return {"touches": touches, "age_events": counter.age(candidate, known), "is_rare": is_rare}
