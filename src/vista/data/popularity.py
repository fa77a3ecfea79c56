"""Popularity: how often and how lately anyone met an item and its categories, as of a moment.

How often is a share of all events, so that a log whose traffic grows, or falls with the season, leaves it where it was.
Each share counts one event more than there was: of all time among as many as there were, in a window among as many
more as one event takes at the item's share of all time. So a window with few events says what all time says.

It is no fact about a user, so no user's record holds it: it is a table of the catalogue, remade in bulk from time to
time, say with every `vista summarize`. Training and evaluation look at the log as such a table would have had it: as of
the last multiple of ``popularity_hours`` before the request, and never after.

Keys are those of `vista.data.counts`: the item index, or an item's value of a categorical feature; key 0 is never met.

Shape letters: N events, I item indices, C impressions, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from vista.catalogue import Catalogue
from vista.data.histories import Histories, Impressions, PreparedData
from vista.progress import Progress

US_PER_S = 1_000_000
US_PER_HOUR = 3600 * US_PER_S
WINDOWS_S = {"30d": 2_592_000, "1y": 31_557_600}
NEVER_S = 1e10  # three centuries: beyond every true distance, or a model could take never for a long time ago
BLOCK_ROWS = 500_000  # impressions, or events, handled at once: some ten megabytes of temporary arrays
NAMES = ("popularity_share", "anyone_since", "anyone_first", *(f"popularity_share_{name}" for name in WINDOWS_S))
TABLES_KEPT = 4  # of all items at once: a walk in time order needs one


@dataclass(frozen=True)
class Popularity:
    """How often each key was met by anyone before a moment.

    moments (N,) int64 ascending: all timestamps; code (N,) ascending: key * (N + 1) + rank of the timestamp in moments.
    """

    moments: np.ndarray
    code: np.ndarray
    key_of_item: np.ndarray | None = None

    @classmethod
    def of(cls, histories: Histories, key_of_item: np.ndarray | None = None) -> Popularity:
        item = np.asarray(histories.item, np.int64)
        key = item if key_of_item is None else np.asarray(key_of_item[item], np.int64)
        moments = np.sort(np.asarray(histories.timestamp_us, np.int64))
        rank = np.searchsorted(moments, histories.timestamp_us)  # the same for equal times, so that "before" is strict
        return cls(moments, np.sort(key * (len(moments) + 1) + rank), key_of_item)

    def features(self, item: np.ndarray, at_us: np.ndarray) -> np.ndarray:
        """NAMES of each item as of each moment, (C, F) float32.

        Logarithm of the share of all events before; log(1 + x) of the seconds since the newest (NEVER_S where there is
        none) and since the oldest of them; logarithm of the share in each of the windows before.
        """
        first, end = self._rows(item, at_us)
        if not len(self.code):
            return _logs(end, end, np.full(len(end), NEVER_S), end, [(end, end)] * len(WINDOWS_S))
        newest, oldest = (
            self.moments[self.code[np.clip(row, 0, len(self.code) - 1)] % (len(self.moments) + 1)]
            for row in (end - 1, first)
        )
        is_met = end > first
        since = np.where(is_met, (at_us - newest) / US_PER_S, NEVER_S)
        age = np.where(is_met, (at_us - oldest) / US_PER_S, 0)
        before, windows = np.searchsorted(self.moments, at_us), []
        for window_s in WINDOWS_S.values():
            from_us = at_us - window_s * US_PER_S
            windows.append((end - self._rows(item, from_us)[1], before - np.searchsorted(self.moments, from_us)))
        return _logs(end - first, before, since, age, windows)

    def _rows(self, item: np.ndarray, at_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows first .. end - 1 of ``code``: the events with each item's key before each moment; none for key 0."""
        key = item if self.key_of_item is None else np.asarray(self.key_of_item[item], np.int64)
        base = key * (len(self.moments) + 1)
        first = np.searchsorted(self.code, base)
        end = np.searchsorted(self.code, base + np.searchsorted(self.moments, at_us))
        return first, np.where(key > 0, end, first)


def _logs(
    count: np.ndarray, num_events: np.ndarray, since: np.ndarray, age: np.ndarray,
    windows: Sequence[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:  # fmt: skip
    """(C, F). num_events: of everything, where ``count`` are of the key; windows: the same two of each window."""
    share = (count + 1) / (num_events + 1)
    within = [(some + 1) / (total + 1 / share) for some, total in windows]
    columns = [np.log(share), np.log1p(since), np.log1p(age), *(np.log(x) for x in within)]
    return np.stack(columns, -1).astype(np.float32)


@dataclass(frozen=True)
class PopularityFeatures:
    """Popularity of every impression of a split, as of the last refresh before its request.

    matrix (C, F) float32; feature_names: per level NAMES; levels and period_us: what tables of all items are made from.
    """

    matrix: np.ndarray
    feature_names: tuple[str, ...]
    levels: tuple[Popularity, ...]
    num_items: int
    period_us: int

    @classmethod
    def of(cls, data: PreparedData, impressions: Impressions, period_hours: int) -> PopularityFeatures:
        """Count what a table remade every ``period_hours`` would have said at each request."""
        names, keys = popularity_names(data.catalogue), _keys(data.catalogue)
        levels = tuple(Popularity.of(data.histories, key) for key in keys)
        period_us = period_hours * US_PER_HOUR
        matrix = np.empty((impressions.num_impressions, len(names)), np.float32)
        offsets = np.asarray(impressions.offsets, np.int64)
        cuts = np.searchsorted(offsets, np.arange(0, offsets[-1], BLOCK_ROWS))
        with Progress("popularity", total=impressions.num_requests, unit="requests") as progress:
            for start, end in pairwise([*np.unique(cuts).tolist(), impressions.num_requests]):
                rows = slice(offsets[start], offsets[end])
                at_us = impressions.timestamp_us[start:end] // period_us * period_us
                at_us = np.repeat(np.asarray(at_us, np.int64), np.diff(offsets[start : end + 1]))
                item = np.asarray(impressions.item[rows], np.int64)
                matrix[rows] = np.concatenate([level.features(item, at_us) for level in levels], 1)
                progress.advance(end - start)
        return cls(matrix, names, levels, data.catalogue.num_indices, period_us)

    def __call__(self, request: np.ndarray, impression: np.ndarray) -> np.ndarray:
        """Features of some impressions (rows of the split), (n, F) float32; the rows of their requests go unused."""
        return self.matrix[impression]

    def of_all_items(self, timestamp_us: int) -> np.ndarray:
        """The whole table (I, F) that a request at this time would read."""
        return self._table(timestamp_us // self.period_us * self.period_us)

    @lru_cache(maxsize=TABLES_KEPT)  # noqa: B019 (one per evaluation, and gone with it)
    def _table(self, at_us: int) -> np.ndarray:
        item = np.arange(self.num_items)
        at = np.full(len(item), at_us)
        return np.concatenate([level.features(item, at) for level in self.levels], 1)

    def __hash__(self) -> int:
        return id(self)


def popularity_table(histories: Histories, catalogue: Catalogue, at_us: int) -> np.ndarray:
    """The table (I, F) as of a moment, in one pass over the log without sorting it: what ``Popularity`` says."""
    shape = (1 + len(WINDOWS_S), catalogue.num_indices)
    counts, newest, oldest = np.zeros(shape, np.int64), *_no_times(catalogue.num_indices)
    for start in range(0, histories.num_events, BLOCK_ROWS):
        time_us = np.asarray(histories.timestamp_us[start : start + BLOCK_ROWS], np.int64)
        item = np.asarray(histories.item[start : start + BLOCK_ROWS], np.int64)
        item, time_us = item[time_us < at_us], time_us[time_us < at_us]
        for row, window_s in enumerate((None, *WINDOWS_S.values())):
            chosen = item if window_s is None else item[time_us >= at_us - window_s * US_PER_S]
            counts[row] += np.bincount(chosen, minlength=shape[1])
        np.maximum.at(newest, item, time_us)
        np.minimum.at(oldest, item, time_us)
    columns, (total, *totals) = [], counts.sum(1)
    for key in _keys(catalogue):
        of_key = (counts, newest, oldest) if key is None else _by_key(counts, newest, oldest, key)
        (count, *within), last, first = of_key
        is_met = (count > 0) & ((np.arange(shape[1]) if key is None else key) > 0)
        count, *within = (np.where(is_met, c, 0) for c in (count, *within))
        since = np.where(is_met, (at_us - last) / US_PER_S, NEVER_S)
        age = np.where(is_met, (at_us - first) / US_PER_S, 0)
        columns.append(_logs(count, total, since, age, list(zip(within, totals, strict=True))))
    return np.concatenate(columns, 1)


def _no_times(size: int) -> tuple[np.ndarray, np.ndarray]:
    limits = np.iinfo(np.int64)
    return np.full(size, limits.min // 2), np.full(size, limits.max // 2)


def _by_key(
    counts: np.ndarray, newest: np.ndarray, oldest: np.ndarray, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (n, I), newest and oldest (I,) of items to those of their keys, again by item."""
    size = int(key.max(initial=0)) + 1
    last, first = _no_times(size)
    np.maximum.at(last, key, newest)
    np.minimum.at(first, key, oldest)
    summed = np.stack([np.bincount(key, row, minlength=size) for row in counts])
    return summed[:, key], last[key], first[key]


def popularity_names(catalogue: Catalogue) -> tuple[str, ...]:
    """Names of the columns of a table: per level NAMES."""
    return tuple(f"{level}_{name}" for level in ("item", *catalogue.feature_names) for name in NAMES)


def _keys(catalogue: Catalogue) -> list[np.ndarray | None]:
    """The key of each item per level (None: the item itself)."""
    return [None, *(catalogue.features[:, f] for f in range(len(catalogue.feature_names)))]


def latest_table(data: PreparedData) -> tuple[np.ndarray, int]:
    """The table (I, F) of all that the data knows, and the moment it is as of: just after the newest event."""
    newest = data.manifest.statistics.get("last_timestamp_us")
    at_us = 0 if newest is None or newest < 0 else int(newest) + 1
    return popularity_table(data.histories, data.catalogue, at_us), at_us
