"""Exact counts: how often and how lately a user met an item and its categories, as of each request.

Only events strictly before a request are counted: of the user, the first ``num_known`` ones; of all users
(popularity), those with an earlier timestamp. Every number comes from sorting and searching; nothing is hashed or
approximated, and no Python loop runs over events or users.

A *key* is what is counted: the item index, or an item's value of a categorical feature. To *meet* a key is to have an
event with it. Key 0 (padding, or a feature value that is not known) is never met. An item that the catalogue does not
hold is met when any item of its unknown bucket is.

Shape letters: N events, I item indices, Q requests, C impressions, G groups (a group: events of one user with one key),
F features, H half-lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vista.catalogue import Catalogue
from vista.data.histories import Histories, Impressions, PreparedData
from vista.data.popularity import NAMES as POPULARITY_NAMES
from vista.data.popularity import NEVER_S, Popularity
from vista.errors import ConfigError
from vista.progress import Progress

NEVER = -1  # distance of an item the user has not met
HALF_LIVES_S = {"1h": 3600.0, "1d": 86_400.0, "1w": 604_800.0, "30d": 2_592_000.0, "1y": 31_557_600.0}
# "Never" must lie beyond every true distance, or a model could take it for a long time ago.
NEVER_EVENTS = 1e7  # ten times the longest history that ``vista prepare`` keeps by default
US_PER_S = 1e6
PRECEDING_EVENTS, PRECEDING_HALF_LIFE = 16, 4  # newest events to look for predecessors in; worth half so far back
PRECEDING_NAMES = ("item_preceding_mean", "item_preceding_largest", "item_preceding_newest")
USER_NAMES = ("history_length", "history_items", "history_repeats")
BLOCK_ROWS = 2_000_000  # events + impressions handled at once: about half a gigabyte of temporary arrays


@dataclass(frozen=True)
class Shown:
    """C impressions by themselves: user, num_known, timestamp_us and item, each (C,) int64."""

    user: np.ndarray
    num_known: np.ndarray
    timestamp_us: np.ndarray
    item: np.ndarray

    @classmethod
    def of(cls, impressions: Impressions, first_request: int = 0, end_request: int | None = None) -> Shown:
        """The impressions of requests first .. end - 1; default all."""
        end_request = impressions.num_requests if end_request is None else end_request
        offsets = np.asarray(impressions.offsets[first_request : end_request + 1], np.int64)
        sizes = np.diff(offsets)
        user, num_known, timestamp_us = (
            np.repeat(np.asarray(per_request[first_request:end_request], np.int64), sizes)
            for per_request in (impressions.user, impressions.num_known, impressions.timestamp_us)
        )
        item = np.asarray(impressions.item[offsets[0] : offsets[-1]], np.int64)
        return cls(user, num_known, timestamp_us, item)


@dataclass(frozen=True)
class Meetings:
    """Rows first .. end - 1 of an index, each (C,) int64: the events of one user with one key before a request.

    start (C,): the first row of the group, below ``first`` where only the last events of a history count.
    """

    start: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @property
    def count(self) -> np.ndarray:
        return self.end - self.first


@dataclass(frozen=True)
class UserItemIndex:
    """The events of some users, sorted by (user, key, position in the history).

    users (U,) int64 ascending; num_keys; group_code (G,) ascending: place in ``users`` * num_keys + key;
    group_start (G + 1,) rows; position (N,) of each row in its user's history; timestamp_us (N,);
    row_code (N,) ascending: group * stride + position.
    """

    users: np.ndarray
    num_keys: int
    stride: int
    group_code: np.ndarray
    group_start: np.ndarray
    position: np.ndarray
    timestamp_us: np.ndarray
    row_code: np.ndarray
    key_of_item: np.ndarray | None = None

    @classmethod
    def of(
        cls, histories: Histories, users: np.ndarray | None = None, key_of_item: np.ndarray | None = None
    ) -> UserItemIndex:
        """Index the histories of ``users`` (default: all). key_of_item (I,): the key of each item; default: itself."""
        users = np.arange(histories.num_users) if users is None else np.unique(np.asarray(users, np.int64))
        starts = np.asarray(histories.offsets, np.int64)[users]
        lengths = np.asarray(histories.offsets, np.int64)[users + 1] - starts
        first_row = np.cumsum(lengths) - lengths
        position = np.arange(int(lengths.sum())) - np.repeat(first_row, lengths)
        event = position + np.repeat(starts, lengths)
        key = np.asarray(histories.item[event], np.int64)
        key = key if key_of_item is None else np.asarray(key_of_item[key], np.int64)
        num_keys, stride = int(key.max(initial=0)) + 1, int(lengths.max(initial=0)) + 1
        code = np.repeat(np.arange(len(users)), lengths) * num_keys + key
        order = np.argsort(code, kind="stable")  # stable: positions stay ascending within a group
        code, position = code[order], position[order]
        is_first = np.ones(len(code), bool)
        is_first[1:] = code[1:] != code[:-1]
        group_start = np.append(np.flatnonzero(is_first), len(code))
        row_code = (np.cumsum(is_first) - 1) * stride + position
        timestamp_us = np.asarray(histories.timestamp_us[event[order]], np.int64)
        return cls(users, num_keys, stride, code[is_first], group_start, position, timestamp_us, row_code, key_of_item)

    def find(self, shown: Shown, last_events: int | None = None) -> Meetings:
        """The events before each request, of its user, with the key of the item shown: all or in the last T events."""
        key = shown.item if self.key_of_item is None else np.asarray(self.key_of_item[shown.item], np.int64)
        lane = np.searchsorted(self.users, shown.user)
        assert (self.users[np.minimum(lane, len(self.users) - 1)] == shown.user).all(), "a user who is not indexed"
        code = lane * self.num_keys + key
        if not len(self.group_code):
            return Meetings(*(np.zeros(len(key), np.int64),) * 3)
        group = np.minimum(np.searchsorted(self.group_code, code), len(self.group_code) - 1)
        is_met = (self.group_code[group] == code) & (key > 0) & (key < self.num_keys)
        start = self.group_start[group]
        end = np.searchsorted(self.row_code, group * self.stride + shown.num_known)
        first = start
        if last_events is not None:
            oldest = np.maximum(shown.num_known - last_events, 0)
            first = np.searchsorted(self.row_code, group * self.stride + oldest)
        return Meetings(*(np.where(is_met, row, 0) for row in (start, first, end)))

    def events_since(self, shown: Shown, meetings: Meetings) -> np.ndarray:
        """Events since the last meeting, (C,) int64: 1 is the newest event, NEVER where there is none."""
        if not len(self.position):
            return np.full(len(shown.item), NEVER)
        last = self.position[np.maximum(meetings.end - 1, 0)]
        return np.where(meetings.count > 0, shown.num_known - last, NEVER)

    def seconds_since(self, shown: Shown, row: np.ndarray) -> np.ndarray:
        """Seconds from an event, given by its row, to the request, (C,) float64."""
        return (shown.timestamp_us - self.timestamp_us[row]) / US_PER_S

    def num_different(self, shown: Shown, last_events: int | None = None) -> np.ndarray:
        """How many different keys each request's user has met before it, or in the last T events, (C,) int64.

        The first event of a key in that window is one whose key was last met before the window began.
        """
        lane = np.repeat(self.group_code // self.num_keys, np.diff(self.group_start))
        lengths = np.bincount(lane, minlength=len(self.users))
        start = np.cumsum(lengths) - lengths  # of each user's events, laid end to end in the order of their positions
        before = np.full(len(lane), -1)  # position of the event before it with the same key
        is_later = np.arange(len(lane)) > np.repeat(self.group_start[:-1], np.diff(self.group_start))
        before[is_later] = self.position[np.flatnonzero(is_later) - 1]
        met_before = np.full(len(lane) + 1, len(lane))  # by place; the last is beyond every window
        met_before[start[lane] + self.position] = before
        first = start[np.searchsorted(self.users, shown.user)]
        if last_events is None:
            so_far = np.concatenate([[0], np.cumsum(met_before < 0)])
            return so_far[first + shown.num_known] - so_far[first]
        different = np.empty(len(first), np.int64)
        block = max(BLOCK_ROWS // last_events, 1)
        for at in range(0, len(first), block):
            known = shown.num_known[at : at + block, None]
            position = known - np.arange(1, last_events + 1)
            place = np.where(position >= 0, first[at : at + block, None] + position, -1)
            different[at : at + block] = (met_before[place] < np.maximum(known - last_events, 0)).sum(1)
        return different

    def decayed_sums(self) -> np.ndarray:
        """How many meetings each row's group has had up to that row, older ones counting less, (H, N) float64.

        An event that is one half-life older than the row counts a half. The sum over the last 2^k rows of a group is
        put together from two sums over 2^(k-1) rows: log2(largest group) passes, and nothing is ever subtracted.
        """
        rank = np.arange(len(self.position)) - np.repeat(self.group_start[:-1], np.diff(self.group_start))
        sums = np.ones((len(HALF_LIVES_S), len(rank)))
        reach, row = 1, np.flatnonzero(rank >= 1)
        while len(row):
            age_s = (self.timestamp_us[row] - self.timestamp_us[row - reach]) / US_PER_S
            for total, half_life_s in zip(sums, HALF_LIVES_S.values(), strict=True):
                total[row] += total[row - reach] * np.exp2(-age_s / half_life_s)
            reach *= 2
            row = row[rank[row] >= reach]
        return sums


@dataclass(frozen=True)
class CountFeatures:
    """The count features of every impression of a split: matrix (C, F) float32, and the names of its columns.

    Per level (``item``, and each categorical feature of the catalogue), all logarithms being log(1 + x):
    ``<level>_met`` 0 or 1, ``_count`` log count, ``_events_since`` log events since the last meeting (1 = the newest
    event; NEVER_EVENTS when there is none), ``_seconds_since`` likewise (NEVER_S), ``_count_1h`` .. ``_count_1y`` log
    of the count in which an event that old counts a half, and NAMES as `vista.data.popularity` has them, of all users,
    as of the request itself (a model with a sketch reads a table some days old). And ``history_length`` and
    ``history_items``, the log number of events known and of different items among them; ``history_repeats``, the share
    of events whose item had been met before.

    With predecessors also the PRECEDING_NAMES: how near the items of the events just before the user's newest few
    meetings with the item are among the newest PRECEDING_EVENTS: 2^(-events since / PRECEDING_HALF_LIFE), the newest
    event being worth 1, absent ones and the item itself 0. Their mean, the largest, and that of the newest meeting.
    """

    matrix: np.ndarray
    feature_names: tuple[str, ...]

    @classmethod
    def of(
        cls, data: PreparedData, impressions: Impressions, last_events: int | None = None, num_predecessors: int = 0
    ) -> CountFeatures:
        """From prepared data; see ``count_features``."""
        return count_features(data.histories, data.catalogue, impressions, last_events, num_predecessors)

    def __call__(self, request: np.ndarray, impression: np.ndarray) -> np.ndarray:
        """Features of some impressions (rows of the split), (n, F) float32; the rows of their requests go unused."""
        return self.matrix[impression]


def count_features(
    histories: Histories,
    catalogue: Catalogue,
    impressions: Impressions,
    last_events: int | None = None,
    num_predecessors: int = 0,
) -> CountFeatures:
    """Count what each user knew at each request.

    last_events: count only the last so many events before the request, as if the user had no others; popularity, which
    is not the user's, stays whole. num_predecessors: newest meetings of which is known what came before; 0: none.
    Raises ConfigError when last_events is not positive.
    """
    if last_events is not None and last_events < 1:
        raise ConfigError(f"last_events is {last_events}: give a number of events from 1 on, or None for all")
    levels, names = _levels(catalogue), count_names(catalogue, num_predecessors)
    matrix = np.empty((impressions.num_impressions, len(names)), np.float32)
    popularity = [Popularity.of(histories, keys) for _, keys in levels]
    with Progress("count", total=impressions.num_requests, unit="requests") as progress:
        for first, end in request_blocks(histories, impressions):
            shown = Shown.of(impressions, first, end)
            users = np.asarray(impressions.user[first:end])
            known = shown.num_known if last_events is None else np.minimum(shown.num_known, last_events)
            indices = [UserItemIndex.of(histories, users, keys) for _, keys in levels]
            different = indices[0].num_different(shown, last_events)
            columns = [np.log1p(known), np.log1p(different), 1 - different / np.maximum(known, 1)]
            for index, popular in zip(indices, popularity, strict=True):
                columns += _level_features(index, shown, last_events)
                columns += [*popular.features(shown.item, shown.timestamp_us).T]
            if num_predecessors:
                columns += [*_preceding(histories, indices[0], shown, last_events, num_predecessors)]
            matrix[impressions.offsets[first] : impressions.offsets[end]] = np.stack(columns, 1)
            progress.advance(end - first)
    return CountFeatures(matrix, names)


def last_met(histories: Histories, impressions: Impressions) -> np.ndarray:
    """Events since the user last met each item shown, (C,) int64: 1 is the newest event, NEVER (-1) if not met."""
    distance = np.empty(impressions.num_impressions, np.int64)
    for first, end in request_blocks(histories, impressions):
        shown = Shown.of(impressions, first, end)
        index = UserItemIndex.of(histories, np.asarray(impressions.user[first:end]))
        distance[impressions.offsets[first] : impressions.offsets[end]] = index.events_since(shown, index.find(shown))
    return distance


def request_blocks(histories: Histories, impressions: Impressions) -> Iterator[tuple[int, int]]:
    """Ranges of requests that hold whole users, about BLOCK_ROWS events and impressions each (or one user)."""
    users, first = np.unique(impressions.user, return_index=True)
    if not len(users):
        return
    end = np.append(first[1:], impressions.num_requests)
    num_events = np.asarray(histories.offsets)[users + 1] - np.asarray(histories.offsets)[users]
    num_shown = np.asarray(impressions.offsets)[end] - np.asarray(impressions.offsets)[first]
    rows = num_events + num_shown
    block = (np.cumsum(rows) - rows) // BLOCK_ROWS
    starts = first[np.flatnonzero(np.diff(block, prepend=-1))].tolist()
    yield from zip(starts, [*starts[1:], impressions.num_requests], strict=True)


def _levels(catalogue: Catalogue) -> list[tuple[str, np.ndarray | None]]:
    """What is counted: the name of each level and the key of each item (None: the item itself)."""
    return [("item", None), *((name, catalogue.features[:, f]) for f, name in enumerate(catalogue.feature_names))]


def count_names(catalogue: Catalogue, num_predecessors: int) -> tuple[str, ...]:
    """Names of the columns of ``count_features``."""
    decayed = (f"count_{name}" for name in HALF_LIVES_S)
    of_level = ("met", "count", "events_since", "seconds_since", *decayed, *POPULARITY_NAMES)
    names = (*USER_NAMES, *(f"{level}_{name}" for level, _ in _levels(catalogue) for name in of_level))
    return names + PRECEDING_NAMES if num_predecessors else names


def _level_features(index: UserItemIndex, shown: Shown, last_events: int | None) -> list[np.ndarray]:
    """All features of one level but its popularity, each (C,) float64."""
    meetings = index.find(shown, last_events)
    num_half_lives = len(HALF_LIVES_S)
    if not len(index.position):
        never = [np.full(len(shown.item), np.log1p(value)) for value in (0.0, 0.0, NEVER_EVENTS, NEVER_S)]
        return never + [never[0]] * num_half_lives
    is_met = meetings.count > 0
    last = np.maximum(meetings.end - 1, 0)
    seconds = np.where(is_met, index.seconds_since(shown, last), NEVER_S)
    assert (seconds >= 0).all(), "a known event is newer than its request"
    events = np.where(is_met, index.events_since(shown, meetings), NEVER_EVENTS)
    decayed = _decayed_counts(index, shown, meetings)
    features = [is_met.astype(float), np.log1p(meetings.count), np.log1p(events), np.log1p(seconds)]
    return features + [np.log1p(count) for count in decayed]


def _preceding(
    histories: Histories, index: UserItemIndex, shown: Shown, last_events: int | None, num_kept: int
) -> np.ndarray:
    """The PRECEDING_NAMES of each impression, (3, C) float64."""
    found = np.zeros((3, len(shown.item)))
    meetings = index.find(shown, last_events)
    worth = np.exp2(-np.arange(PRECEDING_EVENTS) / PRECEDING_HALF_LIFE)
    block = max(BLOCK_ROWS // (num_kept * PRECEDING_EVENTS), 1)
    for at in range(0, len(shown.item) if len(index.position) else 0, block):
        some = slice(at, at + block)
        known = shown.num_known[some, None]
        start = np.asarray(histories.offsets, np.int64)[shown.user[some], None]
        oldest = np.maximum(known - last_events, 0) if last_events is not None else 0 * known

        def items(place: np.ndarray, start: np.ndarray = start, oldest: np.ndarray = oldest) -> np.ndarray:
            """By places in the history; -1 outside of what is known."""
            event = np.minimum(start + np.maximum(place, oldest), len(histories.item) - 1)
            item = np.asarray(histories.item[event], np.int64)
            return np.where(place >= oldest, item, -1)

        row = meetings.end[some, None] - 1 - np.arange(num_kept)
        before = items(np.where(row >= meetings.first[some, None], index.position[np.maximum(row, 0)] - 1, -1))
        recent = items(known - 1 - np.arange(PRECEDING_EVENTS))
        is_other = (before > 0) & (before != shown.item[some, None])
        is_same = (before[..., None] == recent[:, None]) & is_other[..., None]
        each = (is_same * worth).max(-1)
        found[:, some] = each.sum(1) / np.clip(meetings.count[some], 1, num_kept), each.max(1), each[:, 0]
    return found


def _decayed_counts(index: UserItemIndex, shown: Shown, meetings: Meetings) -> np.ndarray:
    """Decayed counts as of the requests, (H, C) float64: the sum up to the last row less the sum before the first."""
    half_lives = np.array(list(HALF_LIVES_S.values()))[:, None]
    sums = index.decayed_sums()
    is_met, is_cut = meetings.count > 0, meetings.first > meetings.start
    last, before = np.maximum(meetings.end - 1, 0), np.maximum(meetings.first - 1, 0)
    counts = np.zeros((len(half_lives), len(shown.item)))
    for row, chosen, sign in ((last, is_met, 1.0), (before, is_met & is_cut, -1.0)):
        row = row[chosen]
        age_s = (shown.timestamp_us[chosen] - index.timestamp_us[row]) / US_PER_S
        counts[:, chosen] += sign * sums[:, row] * np.exp2(-age_s / half_lives)
    return np.maximum(counts, 0.0)  # the difference of two equal sums may be a rounding error below zero
