"""Worlds where one old like decides: ``needle``, and ``repetition``, its background being one item over and over.

Shape letters: N events, Q requests, C candidates, L likes, G categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.data.worlds.base import (
    LIKE,
    NEVER,
    VIEW,
    Counter,
    Log,
    Requests,
    Statistics,
    World,
    draw_distinct,
    window_start,
)  # fmt: skip

TASTE_SPREAD = 1.0  # standard deviation of the log of a user's taste for a common category


@dataclass(frozen=True, kw_only=True)
class RareCategories(World):
    """Opinions on rare categories, which are never viewed, in a history of views of common ones."""

    rare_categories: int = 24  # the last ones; all opinions and candidates are of these

    @property
    def first_rare(self) -> int:
        """The first rare category; the number of common ones."""
        return self.categories - self.rare_categories

    def check(self) -> None:
        self.require(0 < self.rare_categories < self.categories, "rare_categories",
                     f"must lie between 1 and categories - 1 ({self.categories - 1})")  # fmt: skip
        self.require(self.items >= 2 * self.categories, "items", f"must be at least 2 x categories ({self.categories})")

    def _background(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Items and categories of the views, (N,) each."""
        taste = np.cumsum(rng.lognormal(0.0, TASTE_SPREAD, self.first_rare))
        category = np.searchsorted(taste, rng.random(self.events) * taste[-1], side="right")
        return self.pick_items(rng, category), category


@dataclass(frozen=True, kw_only=True)
class Needle(RareCategories):
    """A candidate of a rare category is clicked with p_hit if the user ever liked that category, else with p_miss.

    Everything else in the history is views of common categories. Each like is asked about at some ages (events from the
    like to the request), its oldest one drawn first and the others not above it: log-uniform from min_age to the whole
    history, or from the list ``ages``. Requests that would fall on the same moment become one, so there may be fewer.
    """

    name: ClassVar[str] = "needle"
    formula: ClassVar[str] = "p_hit if the user liked the candidate's category before the request, else p_miss"

    candidates: int = 4
    likes: int = 8  # per user, each of another rare category
    min_age: int = 100  # events from a like to the first request about it, at least
    ages: tuple[int, ...] = ()  # only these ages, and no like of another age is asked about on purpose
    same_item: bool = False  # a hit shows the liked item itself, not another one of its category
    p_hit: float = 0.9
    p_miss: float = 0.1

    def check(self) -> None:
        self.require(self.candidates >= 2, "candidates", "must be at least 2: a hit and a miss")
        super().check()
        most = self.rare_categories - self.candidates
        self.require(1 <= self.likes <= most, "likes", f"must lie between 1 and rare_categories - candidates ({most})")
        self.require(self.likes <= self.requests, "likes", f"must not be more than requests ({self.requests})")
        oldest = self.events - 1
        for name in ("ages",) if self.ages else ("min_age",):
            values = np.atleast_1d(getattr(self, name))
            self.require(
                values.min() >= 1 and values.max() < oldest, name, f"must lie between 1 and events - 2 ({oldest - 1})"
            )
        for name in ("p_hit", "p_miss"):
            self.require(0 <= getattr(self, name) <= 1, name, "is no probability")

    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        item, category = self._background(rng)
        like_at, num_known = self._moments(rng)
        action = np.full(self.events, VIEW)
        action[like_at] = LIKE
        category[like_at] = self.first_rare + rng.permutation(self.rare_categories)[: len(like_at)]
        item[like_at] = self.pick_items(rng, category[like_at])
        log = Log(item, category, action)
        return log, Requests(num_known, self._candidates(rng, log, num_known))

    @property
    def is_timed(self) -> bool:
        return bool(self.ages)

    def _moments(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places of the likes, (at most L,), and of the requests, (at most Q,): in 1 .. N - 1, ascending."""
        per_like = self.requests // self.likes
        if self.ages:
            choice = np.unique(self.ages)
            rank = rng.integers(len(choice), size=self.likes)[:, None] - np.arange(per_like)
            age = choice[np.where(rank >= 0, rank, rank[:, :1])]  # what does not fit is asked once
        else:
            age = self._log_uniform(rng, np.full((self.likes, 1), self.events - 2))
            age = np.hstack([age, self._log_uniform(rng, np.repeat(age, per_like - 1, 1))])
        like_at = 1 + (rng.random(self.likes) * (self.events - 1 - age[:, 0])).astype(np.int64)
        like_at, kept = np.unique(like_at, return_index=True)
        return like_at, np.unique(like_at[:, None] + age[kept])

    def _log_uniform(self, rng: np.random.Generator, oldest: np.ndarray) -> np.ndarray:
        """Ages from min_age to ``oldest``."""
        ratio = (oldest + 1) / self.min_age
        return np.minimum(self.min_age * ratio ** rng.random(oldest.shape), oldest).astype(np.int64)

    def _candidates(self, rng: np.random.Generator, log: Log, num_known: np.ndarray) -> np.ndarray:
        """Items, (Q, C), of different rare categories; half of them liked before, as far as there are so many."""
        first_rare = self.first_rare
        like_at = np.full(self.rare_categories, len(log.item))
        liked_item = np.full(self.rare_categories, NEVER)
        places = np.flatnonzero(log.is_like)
        like_at[log.category[places] - first_rare] = places
        liked_item[log.category[places] - first_rare] = log.item[places]
        age = num_known[:, None] - like_at  # (Q, rare categories), positive once liked
        is_asked = np.isin(age, self.ages) if self.ages else age >= self.min_age
        num_hits = 1 + rng.binomial(self.candidates - 1, self._other_hits(), len(num_known))
        num_hits = np.minimum(num_hits, is_asked.sum(1))
        key = rng.random(age.shape)
        hit_rank = np.argsort(np.argsort(np.where(is_asked, key, 2.0), axis=1), axis=1)
        is_hit = is_asked & (hit_rank < num_hits[:, None])
        weight = np.where(is_hit, 1e30, np.where(age > 0, 0.0, 1.0))  # so heavy that no hit is left out
        rare = draw_distinct(rng, weight, self.candidates)
        liked = np.where(np.take_along_axis(age, rare, 1) > 0, liked_item[rare], NEVER)
        items = self.pick_items(rng, first_rare + rare, avoid=liked)
        return np.where(self.same_item & (liked >= 0), liked, items)

    def _other_hits(self) -> float:
        """Share of hits among the candidates beside the first: with it half of all are hits. Only one at given ages."""
        return 0.0 if self.ages or self.candidates < 3 else (self.candidates / 2 - 1) / (self.candidates - 1)

    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        age = self._age(log, requests)
        window = requests.num_known[:, None] - window_start(requests.num_known, last_events)[:, None]
        return {"liked": ((age > 0) & (age <= window)).astype(np.int64)}

    def probability(self, statistics: Statistics) -> np.ndarray:
        return np.where(statistics["liked"] > 0, self.p_hit, self.p_miss)

    def details(self, log: Log, requests: Requests) -> Statistics:
        """age_events: events from the like to the request, -1 where there is no like."""
        return {"age_events": self._age(log, requests)}

    def _age(self, log: Log, requests: Requests) -> np.ndarray:
        """Events from the last like of the candidate's category to the request, (Q, C); NEVER without one."""
        return Counter.of(log.category, log.is_like).age(self.category_of(requests.item), requests.num_known[:, None])


@dataclass(frozen=True, kw_only=True)
class Repetition(Needle):
    """The needle world with all other events being one and the same item: needles drowned by repetition."""

    name: ClassVar[str] = "repetition"

    def _background(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        category = rng.integers(self.first_rare, size=1)
        return np.repeat(self.pick_items(rng, category), self.events), np.repeat(category, self.events)
