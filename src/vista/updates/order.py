"""What order events have and which repeat another: `vista prepare`'s rule (``vista.data.sort``) on arriving events.

- A history is in order of time; events of equal time keep the order in which they arrived.
- An event repeats another of the same user when both have the same event id. Where an id is not known, because the log
  has none or because it was not kept, it repeats one of the same item, time and action. The first in order stays. An
  event without an id in a log that has ids repeats nothing.

Shape letters: N events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from vista.errors import DataError

UNKNOWN_ID = -1  # the log has no event ids, or this one was not kept: compare by item, time and action
NULL_ID = 0  # the log has event ids, and this event has none: it repeats nothing


@dataclass(frozen=True)
class Arrivals:
    """N events of many users, in order of arrival unless said otherwise; every field (N,) int64.

    user: row of the user among those worked on together; item: item index; event_id: as `hash_event_ids` gives it.
    """

    user: np.ndarray
    item: np.ndarray
    action: np.ndarray
    timestamp_us: np.ndarray
    event_id: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Self:
        """Some of the events: a mask, or indices in the order wanted."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def none(cls) -> Self:
        return cls(*(np.zeros(0, np.int64) for _ in fields(cls)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One after another."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in [cls.none(), *parts]]) for f in fields(cls)))


def hash_event_ids(event_ids: Sequence[Any] | None, num_events: int) -> np.ndarray:
    """Event ids as positive int64 hashes, (N,): 7 and "7" are the same; None becomes NULL_ID, no ids at all UNKNOWN_ID.

    Raises DataError for an id that is neither an integer nor a string.
    """
    if event_ids is None:
        return np.full(num_events, UNKNOWN_ID, np.int64)
    return np.array([_hash(place, value) for place, value in enumerate(event_ids)], np.int64)


def _hash(place: int, event_id: Any) -> int:
    if event_id is None:
        return NULL_ID
    if isinstance(event_id, bool) or not isinstance(event_id, int | str | np.integer):
        raise DataError(
            f"event {place}: event id {event_id!r} ({type(event_id).__name__}) is not an integer, a string or None"
        )
    digest = hashlib.blake2b(str(event_id).encode(), digest_size=8).digest()
    return max(int.from_bytes(digest, "little") >> 1, 1)  # positive: 0 and below have meanings of their own


def order_of(events: Arrivals) -> np.ndarray:
    """The rows by user, then time; equal times stay as they are, (N,) int64."""
    return np.lexsort((events.timestamp_us, events.user))  # lexsort is stable


def repeats(events: Arrivals) -> np.ndarray:
    """Which events repeat an earlier row, (N,) bool; events by user, then in order."""
    repeated = np.zeros(len(events), bool)
    with_id = np.flatnonzero(events.event_id > 0)
    group, _ = _groups(events.user[with_id], events.event_id[with_id])
    repeated[with_id] = _number_before(group, np.ones(len(group), bool)) > 0
    unknown = events.event_id == UNKNOWN_ID
    if unknown.any():
        rows = np.flatnonzero((events.event_id != NULL_ID) & ~repeated)
        chosen = events.take(rows)
        group, _ = _groups(chosen.user, chosen.timestamp_us, chosen.item, chosen.action)
        before = _number_before(group, np.ones(len(group), bool))
        unknown_before = _number_before(group, unknown[rows])
        repeated[rows] = np.where(unknown[rows], before, unknown_before) > 0
    return repeated


def moves(events: Arrivals) -> np.ndarray:
    """Which events have the id of an earlier row but another time, (N,) bool; events by user, then in order."""
    with_id = np.flatnonzero(events.event_id > 0)
    group, first = _groups(events.user[with_id], events.event_id[with_id])
    moved = np.zeros(len(events), bool)
    moved[with_id] = events.timestamp_us[with_id] != events.timestamp_us[with_id][first[group]]
    return moved


def _groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's group of equal rows, (n,), and the first row of each group."""
    if not len(columns[0]):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort(columns[::-1])
    changes = np.zeros(len(order), bool)
    for column in columns:
        changes[1:] |= column[order][1:] != column[order][:-1]
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(changes)
    changes[0] = True
    return group, order[changes]


def _number_before(group: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How many counted rows of its group stand before each row, (n,)."""
    order = np.argsort(group, kind="stable")
    total = np.cumsum(counted[order]) - counted[order]
    starts = np.flatnonzero(np.append(True, np.diff(group[order]) > 0)) if len(group) else np.zeros(0, np.int64)
    result = np.empty(len(group), np.int64)
    result[order] = total - np.repeat(total[starts], np.diff(np.append(starts, len(group))))
    return result
