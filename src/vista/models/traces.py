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

import torch
from torch import Tensor

from vista.errors import ConfigError

WAYS = 8  # slots of a bucket
CODES = 256
MAX_COUNT = 255
FINGERPRINTS = 65_536
GOLDEN = 0.6180339887498949  # of the range, made odd so that the product can be undone: spreads neighbours (Knuth)
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

    # -- as segments come

    def begin(self, running: tuple[Tensor, Tensor], num_events: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The running value when the next segment comes: num_events (B,) before it, second (B,) of its last event."""
        words, marks = running
        segment = num_events.long() // self.segment_events
        grows = ((segment >= CODES) & (segment & (segment - 1) == 0))[:, None]
        if bool(grows.any()):
            fingerprint, code, count = _unpack(words)
            words = torch.where(grows, _pack(fingerprint, code >> 1, count), words)
            halved = torch.cat([marks[:, 1::2], torch.zeros_like(marks[:, 1::2])], 1)
            marks = torch.where(grows, halved, marks)
        code = segment >> _shift(segment)
        return words, marks.scatter(1, code[:, None], second[:, None].int())

    def take(self, words: Tensor, marks: Tensor, num_events: Tensor, key: Tensor) -> Trace:
        """The traces of keys (B, S), 0 for none, all different; their slots become free, in place.

        num_events: (B,) events, this segment included.
        """
        user = torch.arange(len(key), device=key.device)[:, None].expand_as(key)
        slot, trace = self._find(words, marks, num_events, user, key)
        words[user[trace.is_found], slot[trace.is_found]] = 0
        return trace

    def put(self, words: Tensor, num_events: Tensor, key: Tensor, count: Tensor, place: Tensor) -> None:
        """Write traces of keys (B, S) that have none, 0 for no key, with their count and the place of their newest
        event, (B, S) each, in place. num_events: (B,) events, this segment included.
        """
        bucket, fingerprint = self._scramble(key.long())
        user = torch.arange(len(key), device=key.device)[:, None]
        slots = _slots(bucket)
        _, held, held_count = _unpack(words[user[..., None], slots])
        comes = key > 0
        enters, way = make_room(held.masked_fill(held_count == 0, -1), bucket, comes, torch.full_like(key, WAYS))
        slot = slots.gather(-1, way[..., None])[..., 0]
        segment = (place.long() - 1).clamp(min=0) // self.segment_events
        code = segment >> self._shift_of(num_events)[:, None]
        word = _pack(fingerprint, code, count.long().clamp(max=MAX_COUNT))
        words[user.expand_as(key)[enters], slot[enters]] = word[enters]

    # -- as candidates read them

    def find(self, running: tuple[Tensor, Tensor], num_events: Tensor, user: Tensor, key: Tensor) -> Trace:
        """The traces of keys (Q, C) of users (Q,), rows of the running value; num_events (B,)."""
        return self._find(*running, num_events, user[:, None].expand_as(key), key)[1]

    def keys(self, words: Tensor) -> Tensor:
        """The keys of all traces of one user, words (T,), in no order of theirs."""
        fingerprint, _, count = _unpack(words)
        bucket = torch.arange(self.num_slots, device=words.device) // WAYS
        scrambled = fingerprint * self.num_buckets + bucket
        scrambled = scrambled ^ (scrambled >> ((self.bits + 1) // 2))
        key = (scrambled * pow(self.multiplier, -1, 2**self.bits)) & (2**self.bits - 1)
        return key[count > 0]

    # -- the steps both are made of

    def _find(
        self, words: Tensor, marks: Tensor, num_events: Tensor, user: Tensor, key: Tensor
    ) -> tuple[Tensor, Trace]:
        """Slots and traces of keys (..., C) of users (..., C)."""
        bucket, fingerprint = self._scramble(key.long())
        slots = _slots(bucket)
        held, code, count = _unpack(words[user[..., None], slots])
        is_way = (held == fingerprint[..., None]) & (count > 0) & (key > 0)[..., None]
        is_found, way = is_way.any(-1), is_way.int().argmax(-1, keepdim=True)
        slot, code, count = (t.gather(-1, way)[..., 0] for t in (slots, code, count))
        num_events = num_events.long()
        end = ((code + 1) << self._shift_of(num_events)[user]) * self.segment_events
        place = torch.minimum(end, num_events[user])
        second = marks[user, code].long()
        return slot, Trace(is_found, count * is_found, place * is_found, second * is_found)

    def _shift_of(self, num_events: Tensor) -> Tensor:
        """The shift of the codes after so many events (B,)."""
        return _shift((num_events.long() - 1).clamp(min=0) // self.segment_events)

    def _scramble(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The bucket and the fingerprint of each key, int64."""
        scrambled = (key * self.multiplier) & (2**self.bits - 1)
        scrambled = scrambled ^ (scrambled >> ((self.bits + 1) // 2))
        return scrambled % self.num_buckets, scrambled // self.num_buckets


def make_room(age: Tensor, bucket: Tensor, comes: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Which of those that come, (B, S) bool, find a slot in their bucket (B, S), and which of its slots, (B, S).

    age (B, S, W): of what each slot of the bucket holds; the smallest makes room first. room (B, S): how many slots of
    the bucket may be taken. Where these are too few, those that stand last in the segment get them.
    """
    oldest = age.argsort(dim=-1, stable=True)
    rivals = (bucket[:, :, None] == bucket[:, None, :]) & comes[:, None]
    turn = rivals.triu(1).sum(-1)
    way = oldest.gather(-1, turn.clamp(max=age.shape[-1] - 1)[..., None])[..., 0]
    return comes & (turn < room), way


def _slots(bucket: Tensor) -> Tensor:
    """The slots (..., W) of buckets (...)."""
    return bucket[..., None] * WAYS + torch.arange(WAYS, device=bucket.device)


def _shift(segment: Tensor) -> Tensor:
    """By how many bits the number of the newest segment exceeds a code's eight, int64."""
    limits = CODES << torch.arange(MAX_SHIFT, device=segment.device)
    return (segment[..., None] >= limits).sum(-1)


def _pack(fingerprint: Tensor, code: Tensor, count: Tensor) -> Tensor:
    """One int32 of three int64; its sign is the fingerprint's highest bit."""
    word = (fingerprint << 16) | (code << 8) | count
    return torch.where(word >= 2**31, word - 2**32, word).int()


def _unpack(word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fingerprint, code and count of words, int64 each."""
    word = word.long()
    return (word >> 16) & (FINGERPRINTS - 1), (word >> 8) & (CODES - 1), word & MAX_COUNT
