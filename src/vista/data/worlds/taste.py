"""Worlds of changing taste: ``drift``, where recent and lifelong taste conflict; ``lifelong``, which adds old likes.

A user has a few lifelong favourites among the common categories. The history runs in phases: at home the favourites are
viewed, away one other category is, and the favourites not at all. So most windows of recent events say nothing about
them, and what they say most about counts for little in the long run.

Shape letters: N events, Q requests, C candidates, G categories, K common categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import (
    LIKE,
    NEVER,
    Counter,
    Log,
    Requests,
    Statistics,
    World,
    draw_distinct,
    share_out,
    sigmoid,
    window_start,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drift(World):
    """P(click) rises with the category's share of the whole history and with its number among the last few events."""

    name: ClassVar[str] = "drift"
    formula: ClassVar[str] = (
        "sigmoid(bias + lifelong_weight clip((share of the candidate's category in the history - low_share)"
        " / (high_share - low_share), 0, 1) + recent_weight min(1, its events among the last recent_taste_events"
        " / recent_full_count))"
    )

    favourites: int = 4  # lifelong favourite categories of a user
    phase_events: int = 200  # mean length of a phase
    home_share: float = 0.3  # of the phases
    focus: float = (
        0.75  # share of a phase's events in its categories; the others are spread over all but the favourites
    )
    recent_taste_events: int = 32  # how far recent taste looks back
    recent_full_count: int = 8  # so many of them are as good as more
    low_share: float = 0.025  # of the history: less is no taste,
    high_share: float = 0.05  # and more no more than this
    bias: float = -2.5
    lifelong_weight: float = 3.0
    recent_weight: float = 3.0

    @property
    def num_common(self) -> int:
        """Categories that are viewed; the first ones."""
        return self.categories

    def check(self) -> None:
        most = self.num_common - 2
        self.require(
            1 <= self.favourites <= most, "favourites", f"must lie between 1 and the common categories - 2 ({most})"
        )
        self.require(self.items >= 2 * self.categories, "items", f"must be at least 2 x categories ({self.categories})")
        self.require(self.candidates <= self.num_common - 2, "candidates", f"must be at most {self.num_common - 2}")
        for name in ("phase_events", "recent_taste_events", "recent_full_count"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("home_share", "focus"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no share")
        self.require(
            0 <= self.low_share < self.high_share, "low_share", f"must be below high_share ({self.high_share})"
        )

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        log = self._views(rng)
        log = self._add_likes(rng, log)
        num_known = 1 + np.sort(rng.choice(self.events - 1, self.requests, replace=False))
        groups = self._groups(log, num_known)
        category = draw_distinct(rng, share_out(groups), self.candidates)
        return log, Requests(num_known, self.pick_items(rng, category, avoid=self._liked_items(log)[category]))

    def _views(self, rng: np.random.Generator) -> Log:
        """The history without likes."""
        shuffled = rng.permutation(self.num_common)
        favourites, others = shuffled[: self.favourites], shuffled[self.favourites :]
        phase = np.cumsum(rng.random(self.events) < 1 / self.phase_events)
        num_phases = int(phase[-1]) + 1
        is_home = (rng.random(num_phases) < self.home_share)[phase]
        current = rng.choice(others, num_phases)[phase]
        category = np.where(is_home, rng.choice(favourites, self.events), current)
        category = np.where(rng.random(self.events) < self.focus, category, rng.choice(others, self.events))
        return Log.of_views(self.pick_items(rng, category), category)

    def _add_likes(self, rng: np.random.Generator, log: Log) -> Log:
        return log

    def _liked_items(self, log: Log) -> np.ndarray:
        """(G,) the item last liked of each category, which is never shown; NEVER where there is none."""
        liked = np.full(self.categories, NEVER)
        liked[log.category[log.is_like]] = log.item[log.is_like]
        return liked

    def _groups(self, log: Log, num_known: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """What to show: groups of categories as of each request, (Q, G) bool, and the share of candidates from each."""
        every = np.arange(self.categories)
        known = num_known[:, None]
        counter = Counter.of(log.category)
        recent = counter.within(every, np.maximum(known - self.recent_taste_events, 0), known)
        is_current = (recent >= self.recent_full_count) & (every < self.num_common)
        share = counter.before(every, known) / known
        is_favourite = (share > self.high_share) & (every < self.num_common)
        is_common = np.broadcast_to(every < self.num_common, share.shape)
        return [(is_current, 0.3), (is_favourite & ~is_current, 0.35), (is_common, 0.35)]

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """total: events of the candidate's category. recent: of those the ones in the last recent_taste_events.
        length: events counted. """  # fmt: skip
        category = self.category_of(requests.item)
        known = requests.num_known[:, None]
        start = window_start(requests.num_known, last_events)[:, None]
        counter = Counter.of(log.category)
        return {
            "total": counter.within(category, start, known),
            "recent": counter.within(category, np.maximum(start, known - self.recent_taste_events), known),
            "length": np.broadcast_to(known - start, category.shape),
        }

    def probability(self, statistics: Statistics) -> np.ndarray:
        return sigmoid(self._logit(statistics))

    def _logit(self, statistics: Statistics) -> np.ndarray:
        share = statistics["total"] / statistics["length"]
        lifelong = np.clip((share - self.low_share) / (self.high_share - self.low_share), 0, 1)
        recent = np.minimum(statistics["recent"] / self.recent_full_count, 1)
        return self.bias + self.lifelong_weight * lifelong + self.recent_weight * recent

    def details(self, log: Log, requests: Requests) -> Statistics:
        """Of the candidate's category, in the history: category_count events; recent_count, of the last few events."""
        known = self.statistics(log, requests)
        return {"category_count": known["total"], "recent_count": known["recent"]}


@dataclass(frozen=True, kw_only=True)
class Lifelong(Drift):
    """Drift, and likes of rare categories that are never forgotten: needles, recent taste and favourites in one log."""

    name: ClassVar[str] = "lifelong"
    formula: ClassVar[str] = (
        Drift.formula[:-1] + " + like_weight [the user liked the candidate's category before the request])"
    )

    rare_categories: int = 16  # the last ones; liked, but never viewed
    likes: int = 6  # per user, each of another rare category
    like_weight: float = 5.0

    @property
    def num_common(self) -> int:
        return self.categories - self.rare_categories

    def check(self) -> None:
        most = self.categories - 3
        self.require(
            1 <= self.rare_categories <= most, "rare_categories", f"must lie between 1 and categories - 3 ({most})"
        )
        self.require(
            0 <= self.likes < self.rare_categories,
            "likes",
            f"must be less than rare_categories ({self.rare_categories})",
        )
        super().check()

    def _add_likes(self, rng: np.random.Generator, log: Log) -> Log:
        """Turn events all over the history into likes."""
        places = np.sort(rng.choice(self.events, min(self.likes, self.events), replace=False))
        item, category, action = log.item.copy(), log.category.copy(), log.action.copy()
        action[places] = LIKE
        category[places] = self.num_common + rng.permutation(self.rare_categories)[: len(places)]
        item[places] = self.pick_items(rng, category[places])
        return Log(item, category, action)

    def _groups(self, log: Log, num_known: np.ndarray) -> list[tuple[np.ndarray, float]]:
        every = np.arange(self.categories)
        is_liked = Counter.of(log.category, log.is_like).before(every, num_known[:, None]) > 0
        is_other_rare = ~is_liked & (every >= self.num_common)
        common = [(group, share * 0.6) for group, share in super()._groups(log, num_known)]
        return [(is_liked, 0.2), (is_other_rare, 0.2), *common]

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """Besides those of drift, liked: likes of the candidate's category; is_rare: whether it can be liked at all."""
        category = self.category_of(requests.item)
        start = window_start(requests.num_known, last_events)[:, None]
        liked = Counter.of(log.category, log.is_like).within(category, start, requests.num_known[:, None])
        is_rare = (category >= self.num_common).astype(np.int64)
        return super().statistics(log, requests, last_events) | {"liked": liked, "is_rare": is_rare}

    def _logit(self, statistics: Statistics) -> np.ndarray:
        return super()._logit(statistics) + self.like_weight * (statistics["liked"] > 0)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """Besides those of drift, age_events: events from the like to the request, -1 where there is none."""
        category = self.category_of(requests.item)
        age = Counter.of(log.category, log.is_like).age(category, requests.num_known[:, None])
        return super().details(log, requests) | {"age_events": age}
