"""The world of set membership: was this item ever in the history?

Shape letters: N events, Q requests, C candidates, V items, U items a user touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import Counter, Log, Requests, Statistics, World, draw_distinct, share_out, window_start


@dataclass(frozen=True, kw_only=True)
class Membership(World):
    """Each user touches a few items again and again, some much oftener than others; a click says: touched before."""

    name: ClassVar[str] = "membership"
    formula: ClassVar[str] = "p_hit if the candidate occurs in the history before the request, else p_miss"

    items: int = 512
    categories: int = 16
    touched: int = 48  # different items of a user
    zipf: float = 1.0  # the item of rank r is touched in proportion to r^-zipf
    p_hit: float = 1.0
    p_miss: float = 0.0

    def check(self) -> None:
        most = self.items - self.candidates
        self.require(1 <= self.touched <= most, "touched", f"must lie between 1 and items - candidates ({most})")
        self.require(self.zipf >= 0, "zipf", "must not be negative")
        for name in ("p_hit", "p_miss"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no probability")

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        own = rng.permutation(self.items)[: self.touched]
        weight = np.cumsum(np.arange(1, self.touched + 1) ** -self.zipf)
        item = own[np.searchsorted(weight, rng.random(self.events) * weight[-1], side="right")]
        log = Log(item, self.category_of(item), np.zeros(self.events, bool))
        num_known = 1 + np.sort(rng.choice(self.events - 1, self.requests, replace=False))
        is_touched = Counter.of(item).before(np.arange(self.items), num_known[:, None]) > 0
        candidates = draw_distinct(rng, share_out([(is_touched, 0.5), (~is_touched, 0.5)]), self.candidates)
        return log, Requests(num_known, candidates)

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """touches: events with the candidate."""
        start = window_start(requests.num_known, last_events)[:, None]
        return {"touches": Counter.of(log.item).within(requests.item, start, requests.num_known[:, None])}

    def probability(self, statistics: Statistics) -> np.ndarray:
        return np.where(statistics["touches"] > 0, self.p_hit, self.p_miss)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """touches: events with the candidate in the history. age_events: events since the last one, -1 without one.
        is_rare: whether it belongs to the half touched least of the user's items known at the request.
        """
        counter, known = Counter.of(log.item), requests.num_known[:, None]
        touches = counter.before(requests.item, known)
        own = np.sort(counter.before(np.unique(log.item), known), axis=1)
        num_untouched, num_own = (own == 0).sum(1), own.shape[1]
        middle = num_untouched + (num_own - num_untouched - 1) // 2
        median = np.take_along_axis(own, middle[:, None], 1)
        is_rare = ((touches > 0) & (touches <= median)).astype(np.int64)
        return {"touches": touches, "age_events": counter.age(requests.item, known), "is_rare": is_rare}
