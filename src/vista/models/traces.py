"""Traces: what a sketch keeps of an item whose entry had to make room, four bytes each.

A full entry of `vista.models.sketch` takes some thirty bytes, so a sketch of 64 KB forgets items of a long history
altogether. A *trace* still knows which item it was, how often it was met (up to 255 times), and when last, roughly:

    word = fingerprint (16 bits) | code (8 bits) | count (8 bits)          0: the slot is free

The item's index is put through a one-to-one scrambling; the remainder by the number of buckets says in which bucket it
lies, the quotient is the fingerprint. Both together are the index again, so a trace is never taken for another item's,
and can be read back. (Catalogues of more than 65,536 items for each bucket are refused.)

The *code* is the number of the segment that met the item last, over 2^shift. The shift is the smallest with which the
newest segment has a code below 256; when it grows, all codes are halved. Rounding down twice is rounding down once, so
a code depends on the segment and on how many there are, not on when it was written. For each code a *mark* keeps when
its last segment ended. So both ages are known to one part in 128 of the history, and to a segment in the newest 256.

Buckets have eight slots; a trace that finds none free takes that of the smallest code. An item that is met again takes
its trace along into its entry.

Shape letters: B users, T slots of traces, S events in a segment, W slots of a bucket, Q requests, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.errors import ConfigError

WAYS = 8  # slots of a bucket
CODE_BITS = 8
CODES = 1 << CODE_BITS
MAX_COUNT = 255
FINGERPRINTS = 65_536
GOLDEN = 0.6180339887498949  # of the range, made odd so that the product can be undone: spreads neighbours (Knuth)
LATER = np.triu(np.ones((64, 64), bool), 1)  # whether the column stands later than the row
MAX_SHIFT = 23  # 2^31 segments are beyond what a place can count


@dataclass(frozen=True)
class Trace:
    """What is known of some keys: is_found (...) bool; count, place and second (...) int64, 0 where it is not found.

    place: in the history, counted from 1, the last one the code allows; second: when that was.
    """

    is_found: Tensor
    count: Tensor
    place: Tensor
    second: Tensor


class Traces:
    """The running value is (words, marks): (B, T) int32, and for each code the second of its newest event, (B, 256)
    int32. Raises ConfigError where there are too many items for so few slots.
    """

    names = ("sketch_words", "sketch_marks")

    def __init__(self, num_slots: int, num_keys: int, segment_events: int) -> None:
        self.num_buckets = max(num_slots // WAYS, 1)
        self.num_slots = self.num_buckets * WAYS
        self.segment_events = segment_events
        self.bits = max((num_keys - 1).bit_length(), 1)
        self.multiplier = int(GOLDEN * 2**self.bits) | 1
        if 2**self.bits > FINGERPRINTS * self.num_buckets:
            raise ConfigError(
                f"sketch_traces {num_slots}: {num_keys:,} items need at least "
                f"{2**self.bits // FINGERPRINTS * WAYS:,}, or 0 for none"
            )

    def initial(self, num_users: int) -> tuple[Tensor, Tensor]:
        """The running value of an empty history."""
        return (
            torch.zeros(num_users, self.num_slots, dtype=torch.int32),
            torch.zeros(num_users, CODES, dtype=torch.int32),
        )

    # -- as segments come: in place, in numpy arrays (`vista.models.sketch_fold`)

    def begin(
        self, words: np.ndarray, marks: np.ndarray, user: np.ndarray, num_events: np.ndarray, second: np.ndarray
    ) -> None:
        """Users (U,), rows of the running value, come to their next segment: num_events (U,) before it, second (U,) of
        its last event.
        """
        segment = num_events // self.segment_events
        grows = user[(segment >= CODES) & (segment & (segment - 1) == 0)]
        if len(grows):
            fingerprint, code, count = _unpack(words[grows].astype(np.int64))
            words[grows] = _pack(fingerprint, code >> 1, count)
            halved = marks[grows, 1::2]
            marks[grows] = np.concatenate([halved, np.zeros_like(halved)], 1)
        marks[user, segment >> _shift(segment)] = second

    def take(
        self, words: np.ndarray, marks: np.ndarray, user: np.ndarray, num_events: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of keys (n,) of users (n,) those that have a trace, (m,) rows, with its count and second; their slots become
        free. num_events: (n,) events of each user, this segment included.
        """
        bucket, fingerprint = self._scramble(key)
        slots = bucket[:, None] * WAYS + np.arange(WAYS)
        held, code, count = _unpack(words[user[:, None], slots].astype(np.int64))
        found, way = ((held == fingerprint[:, None]) & (count > 0)).nonzero()
        words[user[found], slots[found, way]] = 0
        return found, count[found, way], marks[user[found], code[found, way]].astype(np.int64)

    def put(
        self,
        words: np.ndarray,
        user: np.ndarray,
        num_events: np.ndarray,
        key: np.ndarray,
        count: np.ndarray,
        place: np.ndarray,
    ) -> None:
        """Write traces of keys (n,) > 0 of users (n,) that have none, with their count and the place of their newest
        event, (n,) each. num_events: (n,) events of each user, this segment included.
        """
        bucket, fingerprint = self._scramble(key)
        slots = bucket[:, None] * WAYS + np.arange(WAYS)
        _, held, held_count = _unpack(words[user[:, None], slots].astype(np.int64))
        turn = later_rivals(user * self.num_buckets + bucket)
        way = oldest_way(np.where(held_count > 0, held, -1), turn)
        segment = np.maximum(place - 1, 0) // self.segment_events
        newest = np.maximum(num_events - 1, 0) // self.segment_events
        word = _pack(fingerprint, segment >> _shift(newest), np.minimum(count, MAX_COUNT))
        enters = turn < WAYS
        words[user[enters], slots[enters, way[enters]]] = word[enters]

    # -- as candidates read them

    def find(self, running: tuple[Tensor, Tensor], num_events: Tensor, user: Tensor, key: Tensor) -> Trace:
        """The traces of keys (Q, C) of users (Q,), rows of the running value; num_events (B,)."""
        words, marks = running
        user = user[:, None].expand_as(key)
        bucket, fingerprint = self._scramble(key.long())
        slots = bucket[..., None] * WAYS + torch.arange(WAYS, device=key.device)
        held, code, count = _unpack(words[user[..., None], slots].long())
        is_way = (held == fingerprint[..., None]) & (count > 0) & (key > 0)[..., None]
        is_found, way = is_way.any(-1), is_way.int().argmax(-1, keepdim=True)
        code, count = (t.gather(-1, way)[..., 0] for t in (code, count))
        num_events = num_events.long()
        shift = _torch_shift((num_events - 1).clamp(min=0) // self.segment_events)[user]
        place = torch.minimum(((code + 1) << shift) * self.segment_events, num_events[user])
        second = marks[user, code].long()
        return Trace(is_found, count * is_found, place * is_found, second * is_found)

    def keys(self, words: Tensor) -> Tensor:
        """The keys of all traces of one user, words (T,), in no order of theirs."""
        fingerprint, _, count = _unpack(words.long())
        bucket = torch.arange(self.num_slots, device=words.device) // WAYS
        scrambled = fingerprint * self.num_buckets + bucket
        scrambled = scrambled ^ (scrambled >> ((self.bits + 1) // 2))
        key = (scrambled * pow(self.multiplier, -1, 2**self.bits)) & (2**self.bits - 1)
        return key[count > 0]

    def _scramble(self, key: Any) -> tuple[Any, Any]:
        """The bucket and the fingerprint of each key, int64 all, a tensor or an array."""
        scrambled = (key * self.multiplier) & (2**self.bits - 1)
        scrambled = scrambled ^ (scrambled >> ((self.bits + 1) // 2))
        return scrambled % self.num_buckets, scrambled // self.num_buckets


def later_rivals(place: np.ndarray) -> np.ndarray:
    """How many rows after each one (n,) have the same place."""
    size = len(place)
    if size <= len(LATER):  # fewer, if larger, steps
        return ((place[:, None] == place) & LATER[:size, :size]).sum(1)
    order = place.argsort(kind="stable")
    ordered = place[order]
    is_end = np.ones(size, bool)
    is_end[:-1] = ordered[1:] != ordered[:-1]
    end = is_end.nonzero()[0]
    group = np.zeros(size, np.int64)
    group[1:] = is_end[:-1].cumsum()
    turn = np.empty(size, np.int64)
    turn[order] = end[group] - np.arange(size)
    return turn


def oldest_way(age: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Which slot of its bucket makes room for each of those that come, (n,): for the last the oldest one, and so on.

    age (n, W) of what the slots hold: the smallest makes room first; turn (n,): how many come later to the same bucket.
    """
    return age.argsort(1, kind="stable")[np.arange(len(age)), np.minimum(turn, age.shape[1] - 1)]


def _shift(segment: np.ndarray) -> np.ndarray:
    """By how many bits the number of the newest segment exceeds a code's eight, int64."""
    return np.maximum(np.frexp(segment)[1].astype(np.int64) - CODE_BITS, 0)


def _torch_shift(segment: Tensor) -> Tensor:
    """The same in torch, which has no exact logarithm of integers."""
    limits = CODES << torch.arange(MAX_SHIFT, device=segment.device)
    return (segment[..., None] >= limits).sum(-1)


def _pack(fingerprint: np.ndarray, code: np.ndarray, count: np.ndarray) -> np.ndarray:
    """One int32 of three int64; its sign is the fingerprint's highest bit."""
    return ((fingerprint << 16) | (code << 8) | count).astype(np.uint32).view(np.int32)


def _unpack(word: Any) -> tuple[Any, Any, Any]:
    """The fingerprint, code and count of words, int64 all, tensors or arrays."""
    return (word >> 16) & (FINGERPRINTS - 1), (word >> 8) & (CODES - 1), word & MAX_COUNT
