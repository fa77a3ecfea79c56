"""The world where an opinion is taken back: only the last like or dislike of a category counts.

Shape letters: N events, Q requests, C candidates, O opinions, G categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import (
    DISLIKE,
    LIKE,
    VIEW,
    Counter,
    Log,
    Requests,
    Statistics,
    draw_distinct,
    share_out,
    window_start,
)  # fmt: skip
from vista.data.worlds.needle import RareCategories


@dataclass(frozen=True, kw_only=True)
class Dislike(RareCategories):
    """A candidate of a rare category is clicked with p_hit if the user's last opinion of that category was a like.

    Likes and dislikes of rare categories lie all over a history of views of common ones. Each opinion of a category is
    the opposite of the one before with probability ``flip``; at a half, the earlier ones tell nothing about the last.
    """

    name: ClassVar[str] = "dislike"
    formula: ClassVar[str] = (
        "p_hit if the user's last opinion of the candidate's category before the request was a like; p_miss if it was a"
        " dislike, or there is none"
    )

    opinions: int = 128  # per user, each of a random rare category
    flip: float = 0.5  # chance that an opinion is the opposite of the one before
    p_hit: float = 0.9
    p_miss: float = 0.1

    def check(self) -> None:
        super().check()
        self.require(self.candidates <= self.rare_categories, "candidates",
                     f"must be at most rare_categories ({self.rare_categories})")  # fmt: skip
        self.require(1 <= self.opinions <= self.events, "opinions", f"must lie between 1 and events ({self.events})")
        for name in ("flip", "p_hit", "p_miss"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no probability")

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        item, category = self._background(rng)
        place = np.sort(rng.choice(self.events, self.opinions, replace=False))
        category[place] = self.first_rare + rng.integers(self.rare_categories, size=self.opinions)
        item[place] = self.pick_items(rng, category[place])
        action = np.full(self.events, VIEW)
        action[place] = self._opinions(rng, category[place])
        log = Log(item, category, action)
        num_known = 1 + np.sort(rng.choice(self.events - 1, self.requests, replace=False))
        return log, Requests(num_known, self._candidates(rng, log, num_known))

    def _opinions(self, rng: np.random.Generator, category: np.ndarray) -> np.ndarray:
        """LIKE or DISLIKE for each opinion, (O,), in time order, from its category."""
        is_like = np.empty(len(category), bool)
        last = rng.random(self.categories) < 0.5
        for place, is_flipped in enumerate(rng.random(len(category)) < self.flip):
            last[category[place]] ^= is_flipped
            is_like[place] = last[category[place]]
        return np.where(is_like, LIKE, DISLIKE)

    def _candidates(self, rng: np.random.Generator, log: Log, num_known: np.ndarray) -> np.ndarray:
        """Items, (Q, C), of different rare categories: half of them last liked, as far as there are so many."""
        every = np.arange(self.first_rare, self.categories)
        opinion, _ = self._last(log, every, num_known[:, None])
        groups = [(opinion == LIKE, 0.5), (opinion == DISLIKE, 0.35), (opinion == VIEW, 0.15)]
        return self.pick_items(rng, self.first_rare + draw_distinct(rng, share_out(groups), self.candidates))

    def _last(self, log: Log, category: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last opinion of each category before ``known`` (Q, 1), VIEW without one, and its age; (Q, categories)."""
        age = Counter.of(log.category, log.action != VIEW).age(category, known)
        return np.where(age > 0, log.action[known - np.maximum(age, 1)], VIEW), age

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """opinion: the last one of the candidate's category, an index into ACTIONS; VIEW where there is none."""
        known = requests.num_known[:, None]
        opinion, age = self._last(log, self.category_of(requests.item), known)
        window = known - window_start(requests.num_known, last_events)[:, None]
        return {"opinion": np.where(age <= window, opinion, VIEW)}

    def probability(self, statistics: Statistics) -> np.ndarray:
        return np.where(statistics["opinion"] == LIKE, self.p_hit, self.p_miss)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """Of the candidate's category, in the history: likes and dislikes; age_events: events since the last of either,
        -1 where there is none. """  # fmt: skip
        category, known = self.category_of(requests.item), requests.num_known[:, None]
        counts = {
            name: Counter.of(log.category, log.action == action).before(category, known)
            for name, action in (("likes", LIKE), ("dislikes", DISLIKE))
        }
        return counts | {"age_events": self._last(log, category, known)[1]}
