"""Exact facts beside soft tastes: how often and how lately a user met an item and its categories, of fixed size.

Production rankers hand-craft such features from raw histories. Here they are part of the user's state: a table of slots
that each event adds to, read by each candidate at the slots of its item and of its categories. It streams, merges in
time order and is stored like any memory (`vista.models.memory`), and deleted with it by replay.

A *key* is what is counted: the item index, or an item's value of a categorical feature; key 0, not known, is never met.
A level whose keys fit has a slot per key and is exact. Others hash each key into two tables and believe the smaller
count and the older meeting of the two: collisions only ever add (Cormode and Muthukrishnan 2005, count-min), so a
sketch that says "never" is always right.

Naive definition, exact level: of the events with the candidate's key before the request, the number; for each half-life
h the sum of 2^(-age / h); the place and the time of the newest. The features are those of `vista.data.counts`, but
popularity, which is not the user's, and the shortest half-lives, which the recent events tell.

Shape letters: B users, G segments, S events in a segment, M summaries, P slots of all levels, J tables of all levels, F
half-lives, Q requests, C candidates, R recent events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vista.models.batch import Requests
from vista.models.inputs import US_PER_S
from vista.models.memory import Running
from vista.ops.qla import carried

HALF_LIVES_S = (86_400.0, 2_592_000.0, 31_557_600.0)  # a day, 30 days, a year
EPOCH_S = 631_152_000  # 1990-01-01, the earliest time a log may have by default: seconds from it fit int32 until 2058
NEVER_PLACE, NEVER_SECOND = 0, -(2**31)
NEVER_EVENTS, NEVER_S = 1e7, 1e10  # beyond any true distance, or never could be taken for long ago
NUM_TABLES = 2  # of a hashed level
MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # odd 64-bit constants: golden ratio, and xxHash's prime
HASH_BITS = 31


@dataclass(frozen=True)
class Level:
    """Slots of one kind of key: ``num_tables`` tables of ``num_slots``, the first slot of all being ``start``.

    feature: column of the item features, or None for the item itself.
    """

    feature: int | None
    start: int
    num_slots: int
    num_tables: int

    @property
    def end(self) -> int:
        return self.start + self.num_slots * self.num_tables

    def slots(self, key: Tensor) -> Tensor:
        """Key (...) int64 to its slots (..., tables)."""
        if self.num_tables == 1:
            return (self.start + key)[..., None]
        hashed = [((key * factor) >> (64 - HASH_BITS)) & (2**HASH_BITS - 1) for factor in MULTIPLIERS]
        return torch.stack([self.start + t * self.num_slots + h % self.num_slots for t, h in enumerate(hashed)], -1)


class Sketch(nn.Module):
    """The running value is (sums, last, clock):

    sums   (B, P, 1 + F) float32: per slot the number of events, and for each half-life the decayed number
    last   (B, P, 2) int32: place in the history of the newest event, counted from 1, and its second since EPOCH_S
    clock  (B, 2) int32: events so far, and the second of the newest
    """

    names = ("sketch_sums", "sketch_last", "sketch_clock")

    def __init__(self, num_slots: int, num_items: int, feature_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.levels: list[Level] = []
        start = 0
        for feature, size in ((None, num_items), *enumerate(feature_sizes)):
            fits = size <= num_slots
            level = Level(feature, start, size if fits else num_slots, 1 if fits else NUM_TABLES)
            self.levels.append(level)
            start = level.end
        self.num_slots = start
        self.register_buffer("half_life_s", torch.tensor(HALF_LIVES_S), persistent=False)

    half_life_s: Tensor

    @property
    def num_features(self) -> int:
        """Per level: met, count, events since, seconds since, and a decayed count per half-life."""
        return len(self.levels) * (4 + len(HALF_LIVES_S))

    # -- as a memory

    def initial(self, num_users: int) -> Running:
        """The running value of an empty history."""
        last = torch.tensor([NEVER_PLACE, NEVER_SECOND], dtype=torch.int32)
        return (
            torch.zeros(num_users, self.num_slots, 1 + len(HALF_LIVES_S)),
            last.expand(num_users, self.num_slots, 2).clone(),
            last.expand(num_users, 2).clone(),
        )

    def parts(self, item: Tensor, features: Tensor, timestamp_us: Tensor, is_valid: Tensor) -> Running:
        """The parts of segments: item, timestamp_us, is_valid (G, S), features (G, S, number of features)."""
        num_segments, size = item.shape
        second = _seconds(timestamp_us)
        newest = second.masked_fill(~is_valid, NEVER_SECOND).amax(1)
        value = self._decayed(newest[:, None] - second) * is_valid[..., None]
        place = torch.arange(1, size + 1, device=item.device, dtype=torch.int32).expand(num_segments, size)
        slots, is_met = self._slots(item, features)  # (G, S, J)
        is_met = is_met & is_valid[..., None]
        tables = slots.shape[-1]
        index = slots.flatten(1)[..., None]
        value = (value[:, :, None] * is_met[..., None]).flatten(1, 2)
        sums = value.new_zeros(num_segments, self.num_slots, value.shape[-1])
        sums = sums.scatter_add(1, index.expand_as(value), value)
        met = torch.stack([place, second], -1)[:, :, None].expand(-1, -1, tables, -1)
        empty = torch.tensor([NEVER_PLACE, NEVER_SECOND], dtype=torch.int32, device=item.device)
        met = torch.where(is_met[..., None], met, empty).flatten(1, 2)
        last = empty.expand(num_segments, self.num_slots, 2).clone()
        last = last.scatter_reduce(1, index.expand_as(met), met, "amax")
        return carried(sums), last, torch.stack([is_valid.sum(1).int(), newest], -1)

    def merge(self, running: Running, part: Running) -> Running:
        """The running value after one more segment."""
        (sums, last, clock), (new_sums, new_last, new_clock) = running, part
        elapsed = torch.where(clock[:, 0] > 0, new_clock[:, 1] - clock[:, 1], 0)
        sums = sums * self._decayed(elapsed)[:, None].to(sums.dtype) + new_sums
        is_new = new_last[..., :1] > NEVER_PLACE
        shifted = torch.stack([new_last[..., 0] + clock[:, :1], new_last[..., 1]], -1)
        total = torch.stack([clock[:, 0] + new_clock[:, 0], new_clock[:, 1]], -1)
        return sums, torch.where(is_new, shifted, last), total

    # -- as candidates read it

    def read(self, running: Running, requests: Requests, item_features: Tensor) -> Tensor:
        """Features (Q, C, num_features), exact up to collisions as of each request.

        running (M, ...): as of the summaries; item_features (I, number of features). Events between the summary and the
        request are among the recent ones and are counted from there.
        """
        summed, last, clock = running[0].flatten(0, 1), running[1].flatten(0, 1), running[2][requests.summary]
        slots, is_key = self._slots(requests.candidate, item_features[requests.candidate])
        flat = requests.summary[:, None, None] * self.num_slots + slots
        now = _seconds(requests.timestamp_us)
        faded = self._decayed(now - clock[:, 1])[:, None]
        later = _Later.of(requests, clock[:, 0], self._decayed(now[:, None] - _seconds(requests.recent_us)))
        features, first = [], 0
        for level in self.levels:
            mine = flat[..., first : first + level.num_tables]
            known = is_key[..., first, None]
            sums = summed[mine].amin(2) * faded * known
            newest = last[mine].amin(2)
            newest = torch.where(known, newest, newest.new_tensor([NEVER_PLACE, NEVER_SECOND]))
            candidate, recent = requests.candidate, requests.recent_item
            if level.feature is not None:
                candidate, recent = (item_features[i, level.feature] for i in (candidate, recent))
            more, newer = later.of_key(candidate, recent)
            features.append(_features(sums + more, torch.maximum(newest, newer), requests.num_known, now))
            first += level.num_tables
        return torch.cat(features, -1)

    def _slots(self, item: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (..., J) of items (...) and whether they have the key at all (..., J)."""
        slots, is_key = [], []
        for level in self.levels:
            key = item if level.feature is None else features[..., level.feature]
            slots.append(level.slots(key))
            is_key.append((key > 0)[..., None].expand_as(slots[-1]))
        return torch.cat(slots, -1), torch.cat(is_key, -1)

    def _decayed(self, age_s: Tensor) -> Tensor:
        """What an event of this age counts: 1, and for each half-life what is left of it, (..., 1 + F)."""
        left = torch.exp2(-age_s.clamp(min=0)[..., None] / self.half_life_s)
        return torch.cat([torch.ones_like(left[..., :1]), left], -1)


@dataclass(frozen=True)
class _Later:
    """The recent events after each request's summary.

    is_later (Q, R); value (Q, R, 1 + F) what each counts, 0 where it is not later; met (Q, R, 2) int32 place, second.
    """

    is_later: Tensor
    value: Tensor
    met: Tensor

    @classmethod
    def of(cls, requests: Requests, num_summarized: Tensor, value: Tensor) -> _Later:
        size = requests.recent_item.shape[1]
        place = requests.num_known[:, None] - size + torch.arange(size, device=value.device)
        is_later = (place >= num_summarized[:, None]) & (requests.recent_item > 0)
        met = torch.stack([place.int() + 1, _seconds(requests.recent_us)], -1)
        return cls(is_later, value * is_later[..., None], met)

    def of_key(self, candidate: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys candidate (Q, C) among recent (Q, R): sums (Q, C, 1 + F), and the newest's place and second."""
        is_same = (candidate[:, :, None] == recent[:, None]) & (candidate > 0)[..., None] & self.is_later[:, None]
        empty = self.met.new_tensor([NEVER_PLACE, NEVER_SECOND])
        if not self.met.shape[1]:
            return self.value.new_zeros(*candidate.shape, self.value.shape[-1]), empty.expand(*candidate.shape, 2)
        newest = torch.where(is_same[..., None], self.met[:, None], empty).amax(2)
        return is_same.to(self.value.dtype) @ self.value, newest


def _features(sums: Tensor, newest: Tensor, num_known: Tensor, now: Tensor) -> Tensor:
    """sums (Q, C, 1 + F), newest (Q, C, 2), num_known and now (Q,), to the features of one level (Q, C, 4 + F)."""
    is_met = newest[..., 0] > NEVER_PLACE
    events = (num_known[:, None] - newest[..., 0] + 1).to(sums.dtype)
    seconds = (now[:, None].long() - newest[..., 1]).clamp(min=0).to(sums.dtype)
    since = torch.stack([events.masked_fill(~is_met, NEVER_EVENTS), seconds.masked_fill(~is_met, NEVER_S)], -1)
    logs = torch.cat([sums[..., :1], since, sums[..., 1:]], -1).log1p()
    return torch.cat([is_met[..., None].to(sums.dtype), logs], -1)


def _seconds(timestamp_us: Tensor) -> Tensor:
    """Seconds since EPOCH_S, int32."""
    return (timestamp_us.div(US_PER_S, rounding_mode="floor") - EPOCH_S).clamp(-(2**31) + 1, 2**31 - 1).int()
