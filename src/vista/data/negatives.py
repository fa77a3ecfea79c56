"""Where the negatives of a request made from events come from, and how they are drawn.

    popularity   the item of an event drawn uniformly from all users' events strictly before the request
    category     the same, among events of items of the positive's category
    history      an item the user has met before, last met about as long ago as the positive: at a distance drawn
                 log-uniformly between half and twice the positive's, in events. Where the positive is new to the user
                 there is none

Negatives of the first two sources are rarely in the user's history while most positives are, and an own item drawn
uniformly from the past is mostly far older than the positive: either way how far back an item lies tells what it is.
Among negatives of source history it does not.

Every draw is a hash of (seed, user id, time, slot, attempt): it does not change when events are added at or after the
request, nor with the number of partitions.

Shape letters: R requests, V items, N events, W slots (candidates wanted beside the positive), n draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from vista.catalogue import hash_ids
from vista.data.arrays import ragged_rows, search_ranges
from vista.data.sort import SortedLog
from vista.data.split import mix, uniform
from vista.schema import SOURCES

if TYPE_CHECKING:
    from vista.data.impressions import Bursts

MAX_REDRAWS = 20  # of a negative that does not fit; then the request has one fewer
POPULARITY, CATEGORY, HISTORY = (SOURCES.index(name) for name in ("popularity", "category", "history"))


@dataclass(frozen=True)
class NumNegatives:
    """Negatives wanted per request, by source."""

    popularity: int
    category: int
    history: int


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

    def reach(self, bursts: Bursts, source: int) -> tuple[np.ndarray, np.ndarray]:
        """The events that a source may draw from for each request: the first place and how many, (R,) int64 each."""
        order = np.argsort(bursts.timestamp_us)  # ascending, the search stays near where it was
        before = np.empty(len(order), np.int64)
        before[order] = np.searchsorted(self.time_us, bursts.timestamp_us[order])
        if source == POPULARITY:
            return np.zeros(len(order), np.int64), before
        if self.category is None:
            return np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
        wanted = self.category[bursts.positive]
        first, end = self.category_offsets[wanted], self.category_offsets[wanted + 1]
        return first, np.where(wanted > 0, search_ranges(self.by_category, first, end, before) - first, 0)

    def items_at(self, places: np.ndarray, source: int) -> np.ndarray:
        """The items of drawn events."""
        return self.item[places if source == POPULARITY else self.by_category[places]]


@dataclass(frozen=True)
class OwnItems:
    """All events by user and time, with the events of the same user and item around each.

    item: (N,). since, until: (N,) uint32 events from the one before, and to the next one; 0 where there is none.
    start: (U,) int64 place of each user's first event.
    """

    item: np.ndarray
    since: np.ndarray
    until: np.ndarray
    start: np.ndarray

    @classmethod
    def build(cls, log: SortedLog) -> OwnItems:
        """12 bytes per event."""
        item = np.load(log.item_path)
        since, until = np.zeros(len(item), np.uint32), np.zeros(len(item), np.uint32)
        for chunk in log.chunks():
            user = np.repeat(np.arange(len(chunk.offsets) - 1), np.diff(chunk.offsets))
            order = np.lexsort((chunk.item, user))  # stable: places ascend among events of one user and item
            is_same = (user[order][1:] == user[order][:-1]) & (chunk.item[order][1:] == chunk.item[order][:-1])
            earlier, later = order[:-1][is_same], order[1:][is_same]
            since[chunk.first_event + later] = until[chunk.first_event + earlier] = later - earlier
        return cls(item, since, until, np.cumsum(log.lengths) - log.lengths)

    def distance(self, bursts: Bursts) -> np.ndarray:
        """Events since the user last met the positive, 1 = the newest one known, 0 = never, (R,) int64."""
        end = self.start[bursts.user] + bursts.num_known
        since = self.since[bursts.first].astype(np.int64)
        place = bursts.first - since
        while (is_of_this_moment := (since > 0) & (place >= end)).any():  # an event that is not known yet
            since = np.where(is_of_this_moment, self.since[place], since)
            place = np.where(is_of_this_moment, place - since, place)
        return np.where(since > 0, end - place, 0)

    def near(self, bursts: Bursts, row: np.ndarray, distance: np.ndarray, u: np.ndarray) -> np.ndarray:
        """(n,) items last met at a distance drawn by u in [0, 1) for request ``row``; -1 where none was."""
        back = np.floor(distance * np.exp2(2 * u - 1)).astype(np.int64)
        end = self.start[bursts.user[row]] + bursts.num_known[row]
        is_there = (back >= 1) & (back <= bursts.num_known[row])
        place = np.where(is_there, end - back, 0)
        until = self.until[place]
        is_last = (until == 0) | (place + until >= end)  # not met again before the request
        return np.where(is_there & is_last, self.item[place], -1)


@dataclass(frozen=True)
class FirstMeetings:
    """When each user first met each item. keys: (G,) ascending user * V + item; place: (G,) of that first event.

    start: (U,) int64 place of each user's first event.
    """

    keys: np.ndarray
    place: np.ndarray
    start: np.ndarray
    num_items: int

    @classmethod
    def build(cls, log: SortedLog, own: OwnItems, num_items: int) -> FirstMeetings:
        """16 bytes per user and item they met, 32 while it sorts."""
        place = np.flatnonzero(own.since == 0)
        keys = np.repeat(np.arange(len(log.lengths)), log.lengths)[place] * num_items + own.item[place]
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], place[order], own.start, num_items)

    def were_before(self, bursts: Bursts, row: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(n,) bool: whether the user of request ``row`` had met the item before it."""
        wanted = bursts.user[row].astype(np.int64) * self.num_items + item
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        is_known = self.place[found] < (self.start[bursts.user] + bursts.num_known)[row]
        return (self.keys[found] == wanted) & is_known


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
class Sources:
    """All that negatives are drawn from. of_slot: (W,) the source of each negative wanted.

    own: for negatives of source history. met: where none may be an item that the user had met.
    """

    of_slot: np.ndarray
    pool: Pool
    own: OwnItems | None = None
    met: FirstMeetings | None = None

    @classmethod
    def of(
        cls, log: SortedLog, category: np.ndarray | None, wanted: NumNegatives, met: FirstMeetings | None
    ) -> Sources:
        of_slot = np.repeat([POPULARITY, CATEGORY, HISTORY], [wanted.popularity, wanted.category, wanted.history])
        return cls(of_slot, Pool.build(log, category), OwnItems.build(log) if wanted.history else None, met)


@dataclass(frozen=True)
class _Reach:
    """What can be drawn for some requests.

    num_events: (R, W) int64 events to draw from, 0: none; for own items how far back the positive was last met.
    first: (R, W) int64 place of the first of them; for own items unused.
    """

    sources: Sources
    bursts: Bursts
    first: np.ndarray
    num_events: np.ndarray

    @classmethod
    def of(cls, sources: Sources, bursts: Bursts) -> _Reach:
        first, num_events = (np.zeros((len(bursts.user), len(sources.of_slot)), np.int64) for _ in range(2))
        for source in np.unique(sources.of_slot):
            slots = np.flatnonzero(sources.of_slot == source)
            if source == HISTORY:
                assert sources.own is not None
                num_events[:, slots] = sources.own.distance(bursts)[:, None]
            else:
                found = sources.pool.reach(bursts, source)
                first[:, slots], num_events[:, slots] = found[0][:, None], found[1][:, None]
        return cls(sources, bursts, first, num_events)

    def draw(self, row: np.ndarray, slot: np.ndarray, u: np.ndarray) -> np.ndarray:
        """(n,) items for slots of requests by u in [0, 1); -1 where the draw fits nothing."""
        item = np.full(len(row), -1, np.int64)
        for source in np.unique(self.sources.of_slot[slot]):
            mine = self.sources.of_slot[slot] == source
            first, count = self.first[row[mine], slot[mine]], self.num_events[row[mine], slot[mine]]
            if source == HISTORY:
                assert self.sources.own is not None
                item[mine] = self.sources.own.near(self.bursts, row[mine], count, u[mine])
            else:
                item[mine] = self.sources.pool.items_at(first + (u[mine] * count).astype(np.int64), source)
        return item


def draw_negatives(bursts: Bursts, burst_items: BurstItems, sources: Sources, seed: int) -> np.ndarray:
    """(R, W) item codes, -1 where none was found: no item of the burst, none twice, none that ``sources`` forbids."""
    reach = _Reach.of(sources, bursts)
    drawn = np.full((len(bursts.user), len(sources.of_slot)), -1, np.int64)
    for attempt in range(MAX_REDRAWS + 1):
        row, slot = np.nonzero((drawn < 0) & (reach.num_events > 0))
        if not len(row):
            break
        item = reach.draw(row, slot, _draw(bursts.key[row], slot, attempt, seed))
        is_unfit = burst_items.contain(row, item)
        if sources.met is not None:
            is_unfit |= sources.met.were_before(bursts, row, item)
        is_first = np.diff(row, prepend=-1) > 0
        fresh = np.full((np.count_nonzero(is_first), drawn.shape[1]), -1)
        fresh[np.cumsum(is_first) - 1, slot] = np.where(is_unfit, -1, item)
        drawn[row[is_first]] = _accept(drawn[row[is_first]], fresh)
    return drawn


def shuffle_keys(keys: np.ndarray, num_slots: int, seed: int) -> np.ndarray:
    """A number in [0, 1) for each request and slot, that no draw uses, (R, num_slots)."""
    repeated, slots = np.broadcast_arrays(keys[:, None], np.arange(num_slots))
    return _draw(repeated, slots, MAX_REDRAWS + 1, seed)


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
