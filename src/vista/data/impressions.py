"""Requests made from the event log itself, where no log of impressions was kept.

A *burst* (events of one user at one time, or with one burst value) is one request, at the time of its first event. That
event's item is the positive; the burst's other items are neither candidates nor known history. Negatives come from

    popularity   the item of an event drawn uniformly from all users' events strictly before the request
    category     the same, among events of items of the positive's category

so everything is as it could have been at that time. A positive that nobody had met before could not have been a
negative either, and would give itself away; such bursts make no request.

Every draw is a hash of (seed, user id, time, slot, attempt): it does not change when events are added at or after the
request, nor with the number of partitions.

Shape letters: R requests, V items, N events, W slots (candidates wanted beside the positive).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from vista.catalogue import hash_ids
from vista.data.arrays import chunk_bounds, ragged_rows, search_ranges
from vista.data.sort import Chunk, SortedLog
from vista.data.split import RequestTable, mix, request_keys, uniform
from vista.progress import Progress
from vista.schema import SOURCES

TASK = "next"
MAX_REDRAWS = 20  # of a negative that is already a candidate or belongs to the burst; then the request has one fewer
CHUNK_ROWS = 200_000  # requests and items of their bursts that are worked on at a time


@dataclass(frozen=True)
class MadeRules:
    """num_popularity, num_category: negatives wanted per request. max_requests: a uniform sample of at most so many."""

    num_popularity: int
    num_category: int
    max_requests: int
    seed: int


@dataclass(frozen=True)
class Bursts:
    """Requests to be, sorted by place of their first event, all (R,). first, end: the burst's events in the log."""

    user: np.ndarray
    timestamp_us: np.ndarray
    num_known: np.ndarray
    positive: np.ndarray
    first: np.ndarray
    end: np.ndarray
    key: np.ndarray

    def take(self, rows: np.ndarray | slice) -> Bursts:
        return Bursts(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[Bursts]) -> Bursts:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


@dataclass
class Skipped:
    """Bursts that made no request, and why."""

    unseen_positive: int = 0
    over_max_requests: int = 0
    without_negative: int = 0


def make_requests(
    log: SortedLog, user_hash: np.ndarray, category: np.ndarray | None, num_items: int, rules: MadeRules
) -> tuple[RequestTable, Skipped]:
    """Requests and their candidates from the histories.

    user_hash: (U,) uint64 hash of each user's id. category: (V,) int32 per item, 0 = unknown, or None: no categories.
    """
    skipped = Skipped()
    bursts = find_bursts(log, user_hash, num_items, rules, skipped)
    pool = Pool.build(log, category)
    parts = []
    sizes = 1 + bursts.end - bursts.first
    with Progress("prepare: candidates", total=len(bursts.user), unit="requests") as progress:
        for first, end in chunk_bounds(sizes, CHUNK_ROWS):
            part = bursts.take(slice(first, end))
            parts.append(_candidates(part, BurstItems.read(log, part, num_items), pool, rules))
            progress.advance(end - first)
    return _assemble(bursts, parts, skipped), skipped


def find_bursts(log: SortedLog, user_hash: np.ndarray, num_items: int, rules: MadeRules, skipped: Skipped) -> Bursts:
    """The bursts that make a request; a uniform sample of them where there are more than ``max_requests``.

    The sample keeps those with the smallest hash of their key.
    """
    first_seen_us = log.first_seen_us(num_items)
    kept: list[Bursts] = []
    num_found = num_kept = 0
    for chunk in log.chunks():
        found = _bursts_of(chunk, user_hash, first_seen_us, skipped)
        kept.append(found)
        num_found += len(found.user)
        num_kept += len(found.user)
        if num_kept > 2 * rules.max_requests:
            kept = [_sample(Bursts.join(kept), rules)]
            num_kept = len(kept[0].user)
    bursts = _sample(Bursts.join(kept), rules)
    skipped.over_max_requests = num_found - len(bursts.user)
    return bursts


def _sample(bursts: Bursts, rules: MadeRules) -> Bursts:
    if len(bursts.user) <= rules.max_requests:
        return bursts
    chosen = np.argpartition(mix(bursts.key, rules.seed), rules.max_requests)[: rules.max_requests]
    return bursts.take(np.sort(chosen))


def _bursts_of(chunk: Chunk, user_hash: np.ndarray, first_seen_us: np.ndarray, skipped: Skipped) -> Bursts:
    """The chunk's bursts whose positive somebody had met strictly before."""
    num_events = len(chunk.item)
    lengths = np.diff(chunk.offsets)
    user = np.repeat(np.arange(chunk.first_user, chunk.end_user, dtype=np.int32), lengths)
    place = np.arange(num_events)
    is_later = np.ones(num_events, bool)  # than the event before it
    is_later[1:] = chunk.timestamp_us[1:] != chunk.timestamp_us[:-1]
    is_later[chunk.offsets[:-1][lengths > 0]] = True
    moment_start = np.maximum.accumulate(np.where(is_later, place, 0))

    # a burst ends where the next begins or its user ends; events cut off from their burst's first belong to none
    starts = np.flatnonzero(chunk.is_burst_start)
    user_end = chunk.offsets[user[starts] - chunk.first_user + 1]
    ends = np.minimum(np.append(starts[1:], num_events), user_end)
    is_fair = first_seen_us[chunk.item[starts]] < chunk.timestamp_us[starts]
    skipped.unseen_positive += int((~is_fair).sum())
    starts, ends = starts[is_fair], ends[is_fair]
    known = moment_start[starts] - chunk.offsets[user[starts] - chunk.first_user]
    time_us = chunk.timestamp_us[starts]
    key = request_keys(user_hash[user[starts]], time_us, starts - moment_start[starts])
    return Bursts(
        user[starts], time_us, known, chunk.item[starts], starts + chunk.first_event, ends + chunk.first_event, key
    )


@dataclass(frozen=True)
class Pool:
    """All events in global time order, to draw negatives from.

    time_us, item: (N,). by_category: (N',) uint32 places in them, of the events with a category, by (category, time);
    category c has category_offsets[c] : category_offsets[c + 1]. category: (V,) of each item, or None.
    """

    time_us: np.ndarray
    item: np.ndarray
    category: np.ndarray | None = None
    by_category: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    category_offsets: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))

    @classmethod
    def build(cls, log: SortedLog, category: np.ndarray | None) -> Pool:
        """About 40 bytes per event while it sorts, 16 after."""
        events = pl.DataFrame({"time_us": np.load(log.timestamp_path), "item": np.load(log.item_path)})
        events = events.sort("time_us", maintain_order=True)
        time_us, item = events["time_us"].to_numpy(), events["item"].to_numpy()
        if category is None:
            return cls(time_us, item)
        of_event = category[item].astype(np.min_scalar_type(int(category.max(initial=0))))
        order = np.argsort(of_event, kind="stable").astype(np.uint32)
        counts = np.bincount(of_event, minlength=int(category.max(initial=0)) + 1)
        return cls(time_us, item, category, order, np.concatenate([[0], np.cumsum(counts)]))

    def reach(self, bursts: Bursts) -> np.ndarray:
        """Events to draw from: (R, 2, 2) int64: of the popularity and category source, first place and how many."""
        reach = np.zeros((len(bursts.user), 2, 2), np.int64)
        order = np.argsort(bursts.timestamp_us)  # ascending, the search stays near where it was
        before = np.empty(len(order), np.int64)
        before[order] = np.searchsorted(self.time_us, bursts.timestamp_us[order])
        reach[:, 0, 1] = before
        if self.category is not None:
            wanted = self.category[bursts.positive]
            first, end = self.category_offsets[wanted], self.category_offsets[wanted + 1]
            reach[:, 1, 0] = first
            reach[:, 1, 1] = np.where(wanted > 0, search_ranges(self.by_category, first, end, before) - first, 0)
        return reach

    def items_at(self, places: np.ndarray, is_category: np.ndarray) -> np.ndarray:
        """The items of drawn events."""
        events = places.copy()
        events[is_category] = self.by_category[places[is_category]]
        return self.item[events]


@dataclass(frozen=True)
class BurstItems:
    """Which items belong to the burst of which request. keys: sorted row * V + item."""

    keys: np.ndarray
    num_items: int

    @classmethod
    def read(cls, log: SortedLog, bursts: Bursts, num_items: int) -> BurstItems:
        """Of some requests; row is the place among them."""
        lengths = bursts.end - bursts.first
        row = np.repeat(np.arange(len(lengths)), lengths)
        items = np.load(log.item_path, mmap_mode="r")[ragged_rows(bursts.first, lengths)]
        return cls(np.sort(row * num_items + items, kind="stable"), num_items)  # stable: quick on what is nearly sorted

    def contain(self, row: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(n,) bool."""
        wanted = row * self.num_items + item
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return self.keys[place] == wanted


@dataclass(frozen=True)
class Candidates:
    """Of some requests, flat: how many each has (R,), and per candidate its item and source."""

    counts: np.ndarray
    item: np.ndarray
    source: np.ndarray


def _candidates(bursts: Bursts, burst_items: BurstItems, pool: Pool, rules: MadeRules) -> Candidates:
    """The positive and its negatives, in random order."""
    source = np.repeat(
        np.array([SOURCES.index(name) for name in ("positive", "popularity", "category")], np.int8),
        [1, rules.num_popularity, rules.num_category],
    )
    item = np.column_stack([bursts.positive, _negatives(bursts, burst_items, pool, rules)])
    keys, slots = np.broadcast_arrays(bursts.key[:, None], np.arange(item.shape[1]))
    shuffled = _draw(keys, slots, MAX_REDRAWS + 1, rules.seed)
    shuffled[item < 0] = 2.0  # behind all draws
    order = np.argsort(shuffled, axis=1)
    item, source = np.take_along_axis(item, order, 1), source[order]
    return Candidates((item >= 0).sum(1), item[item >= 0], source[item >= 0])


def _negatives(bursts: Bursts, burst_items: BurstItems, pool: Pool, rules: MadeRules) -> np.ndarray:
    """(R, W) item codes, -1 where none was found: no item of the burst, none twice."""
    is_category = np.repeat([False, True], [rules.num_popularity, rules.num_category])
    reach = pool.reach(bursts)[:, is_category.astype(int)]
    drawn = np.full((len(bursts.user), len(is_category)), -1, np.int64)
    for attempt in range(MAX_REDRAWS + 1):
        row, slot = np.nonzero((drawn < 0) & (reach[:, :, 1] > 0))
        if not len(row):
            break
        first, count = reach[row, slot].T
        place = first + (_draw(bursts.key[row], slot, attempt, rules.seed) * count).astype(np.int64)
        item = pool.items_at(place, is_category[slot])
        is_first = np.diff(row, prepend=-1) > 0
        fresh = np.full((np.count_nonzero(is_first), drawn.shape[1]), -1)
        fresh[np.cumsum(is_first) - 1, slot] = np.where(burst_items.contain(row, item), -1, item)
        drawn[row[is_first]] = _accept(drawn[row[is_first]], fresh)
    return drawn


def _draw(keys: np.ndarray, slot: np.ndarray, attempt: int, seed: int) -> np.ndarray:
    """A number in [0, 1) for each (request, slot, attempt)."""
    number = slot * (MAX_REDRAWS + 2) + attempt + 1
    return uniform(hash_ids(mix(keys, seed) + number.astype(np.uint64)))


def _accept(drawn: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Add fresh draws, (R, W), to those accepted before, leaving out what the request has already; -1 = none."""
    both = np.where(drawn >= 0, drawn, fresh)
    order = np.argsort(both * 2 + (drawn < 0), axis=1, kind="stable")  # of equal items, the accepted one first
    ordered = np.take_along_axis(both, order, 1)
    repeats = np.zeros_like(ordered, bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    is_repeat = np.empty_like(repeats)
    np.put_along_axis(is_repeat, order, repeats, 1)
    return np.where(is_repeat, -1, both)


def _assemble(bursts: Bursts, parts: list[Candidates], skipped: Skipped) -> RequestTable:
    """All requests that have a negative, with their candidates."""
    none = Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8))
    counts, item, source = (
        np.concatenate([getattr(p, n) for p in [*parts, none]]) for n in ("counts", "item", "source")
    )
    positive = SOURCES.index("positive")
    table = RequestTable(
        bursts.user, bursts.timestamp_us, bursts.num_known, np.concatenate([[0], np.cumsum(counts)]), item,
        (source == positive).astype(np.int8)[:, None], source, np.zeros((len(item), 0), np.float32),
    )  # fmt: skip
    skipped.without_negative = int((counts < 2).sum())
    return table.take(np.flatnonzero(counts >= 2)) if skipped.without_negative else table
