"""What all synthetic worlds share: sizes, a user's log and requests, times, and exact counting.

A world draws, one user at a time, a history and requests whose candidates it scores by a formula of the history alone.
``World.statistics`` reads off the history what the formula needs, ``World.probability`` is the formula. Both look at
the events before the request and at nothing else, so the true P(click | history) is known for every impression, and so
is what a model that sees only the last R events can still tell (`vista.data.worlds.best`).

Shape letters: N events of a user, Q requests of a user, C candidates of a request, V items, G categories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vista.errors import ConfigError

ACTIONS = ("view", "like", "dislike")  # of the events; `Log.action` is an index into it
VIEW, LIKE, DISLIKE = range(len(ACTIONS))
START_S = 1_577_836_800  # 2020-01-01 UTC
SECONDS_PER_DAY = 86_400
LEAST_GAP_S = 2  # between events of a user, so that a request fits between any two
LEAST_MEAN_GAP_S = 3  # below it hardly any gap would be longer than LEAST_GAP_S
GAP_SPREAD = 1.5  # standard deviation of the log of a gap: sessions of minutes, pauses of days
EDGE_SHARE = 0.02  # of the period, in which users come and go; otherwise all are there all the time
NEVER = -1  # age of what never happened

Statistics = dict[str, np.ndarray]  # name -> (Q, C) whole numbers


@dataclass(frozen=True)
class Log:
    """One user's events in time order: item, category and action, an index into ACTIONS; (N,) int64 each."""

    item: np.ndarray
    category: np.ndarray
    action: np.ndarray

    @classmethod
    def of_views(cls, item: np.ndarray, category: np.ndarray) -> Log:
        """Nothing but views."""
        return cls(item, category, np.full(len(item), VIEW))

    @property
    def is_like(self) -> np.ndarray:
        """(N,) bool."""
        return self.action == LIKE


@dataclass(frozen=True)
class Requests:
    """One user's requests in time order: events known before each, (Q,) int64 ascending; candidates (Q, C) int64."""

    num_known: np.ndarray
    item: np.ndarray


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A synthetic world and its settings; sizes are per user except where they say otherwise."""

    name: ClassVar[str]
    formula: ClassVar[str]  # P(click) in one line, for world.json

    users: int = 350  # users in all
    events: int = 2_000
    items: int = 1_000  # items in all
    categories: int = 50  # categories in all; item i belongs to category i modulo this
    requests: int = 32
    candidates: int = 6  # per request
    recent_events: int = 128  # R of the model that sees only the last R events
    span_days: int = 730  # the period all users live in
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "events", "items", "categories", "requests", "candidates", "span_days"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.recent_events >= 0, "recent_events", "must not be negative")
        self.require(self.seed >= 0, "seed", "must not be negative")
        self.require(self.requests < self.events, "requests", f"must be less than events ({self.events})")
        least = LEAST_MEAN_GAP_S * self.events / (1 - 2 * EDGE_SHARE) / SECONDS_PER_DAY
        self.require(self.span_days >= least, "span_days", f"is too short for {self.events} events of a user; "
                     f"take at least {int(least) + 1}")  # fmt: skip
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that contradict each other: see ``require``."""

    def require(self, is_fine: bool, setting: str, problem: str) -> None:
        """Raise ConfigError naming the setting and its value unless it is fine."""
        if not is_fine:
            raise ConfigError(f"world {self.name!r}: {setting} {getattr(self, setting)} {problem}")

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[Log, Requests]:
        """One user's history and requests."""

    @abstractmethod
    def statistics(self, log: Log, requests: Requests, last_events: int | None = None) -> Statistics:
        """What the formula needs to know of each candidate, from the events before its request.

        last_events: from the last so many of them alone, as if there had been no others.
        """

    @abstractmethod
    def probability(self, statistics: Statistics) -> np.ndarray:
        """The formula: P(click) of each candidate, (Q, C) float64, from the statistics of the whole history."""

    @abstractmethod
    def details(self, log: Log, requests: Requests) -> Statistics:
        """Facts of each candidate that explain its score, (Q, C) each, to slice results by."""

    @property
    def is_timed(self) -> bool:
        """Whether each request lies so many events after what it asks about as the settings say, wherever it lies."""
        return False

    def best_score(self, log: Log, requests: Requests) -> np.ndarray:
        """P(click | history) of each candidate, (Q, C) float64."""
        return self.probability(self.statistics(log, requests))

    def category_of(self, item: np.ndarray) -> np.ndarray:
        """The category of each item."""
        return item % self.categories

    def pick_items(self, rng: np.random.Generator, category: np.ndarray, avoid: np.ndarray | None = None) -> np.ndarray:
        """An item of each category, some more often than others; not that in ``avoid`` (-1 = none), same shape."""
        num_items = (self.items - 1 - category) // self.categories + 1
        if avoid is None:
            avoid = np.full(category.shape, NEVER)
        num_free = num_items - (avoid >= 0)
        place = (num_free * rng.random(category.shape) ** 2).astype(np.int64)  # squared: low places are popular
        place += (avoid >= 0) & (place >= avoid // self.categories)
        return category + self.categories * place


def draw_times(
    rng: np.random.Generator, num_events: int, num_known: np.ndarray, span_days: int
) -> tuple[np.ndarray, np.ndarray]:
    """Epoch seconds of the events, (N,), and of the requests, (Q,): each between its last known event and the next.

    Gaps are log-normal; the events fill the period but for a random edge on both sides. num_known lies in 1 .. N - 1.
    """
    span_s = span_days * SECONDS_PER_DAY
    first_s = START_S + int(rng.random() * EDGE_SHARE * span_s)
    length_s = span_s * (1 - EDGE_SHARE * (1 + rng.random()))
    weight = rng.lognormal(0.0, GAP_SPREAD, num_events)
    free_s = length_s - LEAST_GAP_S * num_events
    event_s = first_s + np.cumsum(LEAST_GAP_S + (weight * (free_s / weight.sum())).astype(np.int64))
    gap_s = event_s[num_known] - event_s[num_known - 1]
    request_s = event_s[num_known - 1] + 1 + (rng.random(len(num_known)) * (gap_s - 1)).astype(np.int64)
    return event_s, request_s


@dataclass(frozen=True)
class Counter:
    """Where each key occurs in a sequence of ``length`` places: counts in any stretch by binary search.

    code ascending: key * (length + 1) + place.
    """

    code: np.ndarray
    length: int

    @classmethod
    def of(cls, key: np.ndarray, is_counted: np.ndarray | None = None) -> Counter:
        """Of keys (N,), whole numbers from 0; only of those places where ``is_counted`` (N,) bool holds."""
        places = np.arange(len(key)) if is_counted is None else np.flatnonzero(is_counted)
        return cls(np.sort(key[places] * (len(key) + 1) + places), len(key))

    def before(self, key: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Occurrences of each key among the first ``end`` places; the two broadcast."""
        base = key * (self.length + 1)
        return np.searchsorted(self.code, base + end) - np.searchsorted(self.code, base)

    def within(self, key: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Occurrences of each key at places start .. end - 1."""
        base = key * (self.length + 1)
        return np.searchsorted(self.code, base + end) - np.searchsorted(self.code, base + start)

    def age(self, key: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How far before ``end`` each key occurred last: 1 is the place just before it, NEVER where it did not."""
        base = key * (self.length + 1)
        row = np.searchsorted(self.code, base + end) - 1
        last = self.code[np.maximum(row, 0)] - base if len(self.code) else np.full(row.shape, NEVER)
        return np.where((row >= 0) & (last >= 0), end - last, NEVER)


def window_start(num_known: np.ndarray, last_events: int | None) -> np.ndarray:
    """The place of the first event that counts, (Q,)."""
    return np.zeros_like(num_known) if last_events is None else np.maximum(num_known - last_events, 0)


def draw_distinct(rng: np.random.Generator, weight: np.ndarray, count: int) -> np.ndarray:
    """In each row ``count`` different columns, drawn by weight without replacement; (rows, count) int64.

    Every row needs that many positive weights. Source: the Gumbel top-k trick, Kool et al. (2019), "Stochastic beams".
    """
    with np.errstate(divide="ignore"):
        key = np.log(weight) + rng.gumbel(size=weight.shape)
    chosen = np.argpartition(-key, count - 1, axis=1)[:, :count]
    return rng.permuted(chosen, axis=1)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), exact at both ends."""
    small = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1.0, small) / (1 + small)


def share_out(groups: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Weights (rows, columns) that give each group, a bool array of that shape, its share in total. Groups may overlap.

    A group without members gives its share to nobody.
    """
    return sum(share * group / np.maximum(group.sum(1, keepdims=True), 1) for group, share in groups)
