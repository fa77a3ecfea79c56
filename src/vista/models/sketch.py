"""Exact facts beside soft tastes: how often and how lately a user met an item and its categories, of fixed size.

Production rankers hand-craft such features from raw histories. Here they are part of the user's state: a table of
entries, one per key the user met, which each candidate looks up. It streams and is stored like any memory
(`vista.models.memory`), and deleted with it by replay.

A *key* is what is counted: the item index, or an item's value of a categorical feature; key 0, not known, is never met.
A *level* is the table of one kind of key, cut into buckets of a few slots; a key's hash names its bucket, and its entry
carries the key itself, so that two keys are never taken for one another. A level whose keys all fit has a bucket of one
slot for each and forgets nothing. In any other, where a segment brings more new keys than its bucket has room for, they
take the places of those met longest ago. So a sketch that says "met" is always right; one that says "never" may have
forgotten, and counts from the next meeting on. A user of fewer keys than slots is known (almost) exactly. Of items
whose entry had to make room, *traces* (`vista.models.traces`) keep how often and roughly when, where the sketch has
them: several thousand more in the same bytes.

What a user did before is no count, yet tells much of a log in which things are done in turn. So an item's entry may
keep *predecessors*: fingerprints of the items of the events just before its newest few meetings. A candidate is
compared by them with what the user did just now.

Naive definition, all entries kept: of the events with the candidate's key before the request, the number; for each
half-life h the sum of 2^(-age / h); the place and the time of the newest. The features are those of
`vista.data.counts`, but popularity, which is not the user's, and the shortest half-lives, which the recent events tell;
what predecessors say; and two of the whole user: how many items, and which share of the events was of an item met
before. These two are as of the summary, and beside them of the recent events alone, which are the whole history of who
has few.

All that is carried is integers, products from tables, and sums in time order, so that no bit depends on how events are
cut into calls, or on the shape of a batch (exp2 would: its last bit depends on a tensor's length).

Shape letters: B users, G segments, S events in a segment, M summaries, P slots of all levels, W slots of a bucket, J
levels, F half-lives, N predecessors kept, Q requests, C candidates, R recent events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vista.models.batch import Requests
from vista.models.inputs import US_PER_S
from vista.models.memory import Running
from vista.models.sketch_fold import COUNT, DECAY_BITS, KEY, MAX_HALVINGS, PLACE, UNKNOWN, SketchFold
from vista.models.traces import Traces
from vista.ops.order import SegmentOrder

HALF_LIVES_S = (86_400, 2_592_000, 31_557_600)  # a day, 30 days, a year
EPOCH_S = 631_152_000  # 1990-01-01, the earliest time a log may have by default: seconds from it fit int32 until 2058
NEVER_PLACE, NEVER_SECOND = 0, -(2**31)
NEVER_EVENTS, NEVER_S = 1e7, 1e10  # beyond any true distance, or never could be taken for long ago
WAYS = 8  # slots of a bucket: with 8, who must make room differs little from the oldest of all
FEATURE_SLOTS = 128  # most slots of a level of categories: bounds what a catalogue with many of them costs
MULTIPLIER = -7046029254386353131  # odd 64-bit constant: the golden ratio
HASH_BITS = 31
FINGERPRINT_BITS = 15  # of a predecessor: one of 16 recent events is taken for one of 4 once in 500 times
PRECEDING_NAMES = ("mean", "largest", "newest")  # features of the predecessors
PRECEDING_EVENTS, PRECEDING_HALF_LIFE = 16, 4  # newest events to look for predecessors in; worth half so far back


@dataclass(frozen=True)
class Level:
    """The slots of one kind of key: ``num_buckets`` of ``ways``, the first slot of all being ``start``.

    feature: column of the item features, or None for the item itself.
    """

    feature: int | None
    start: int
    num_buckets: int
    ways: int

    @classmethod
    def of(cls, feature: int | None, start: int, num_keys: int, num_slots: int) -> Level:
        """A slot per key where they fit into ``num_slots``, else buckets."""
        if num_keys <= num_slots:
            return cls(feature, start, num_keys, 1)
        return cls(feature, start, max(num_slots // WAYS, 1), WAYS)

    @property
    def end(self) -> int:
        return self.start + self.num_buckets * self.ways

    def bucket(self, key: Tensor) -> Tensor:
        """Key (...) int64 to the first slot of its bucket, (...)."""
        if self.ways > 1:
            key = ((key * MULTIPLIER) >> (64 - HASH_BITS)) & (2**HASH_BITS - 1)
        return self.start + key % self.num_buckets * self.ways

    def slots(self, key: Tensor) -> Tensor:
        """The slots (..., W) of a key's bucket."""
        return self.bucket(key)[..., None] + torch.arange(self.ways, device=key.device)


class Sketch(nn.Module):
    """The running value is (entries, decayed, clock):

    entries  (B, P, 4) int32: key, 0 where the slot is free; events with it; place in the history of the newest,
             counted from 1; its second since EPOCH_S
    decayed  (B, P, F) float32: for each half-life the decayed number of these events as of the newest of them
    clock    (B, 2) int32: events so far, and how many of them brought an item that had neither entry nor trace

    and behind them, where there are traces, (words, marks) of `vista.models.traces` (segment_events: S, with traces),
    and where there are predecessors

    preceding  (B, items' P, N) int16: fingerprints of the events before the newest N with this item, newest first
    newest     (B, 1) int16: the fingerprint of the newest event

    a fingerprint being 0 where there is no event.
    """

    def __init__(
        self,
        num_slots: int,
        num_items: int,
        feature_sizes: tuple[int, ...],
        num_traces: int = 0,
        segment_events: int = 1,
        num_predecessors: int = 0,
    ) -> None:
        super().__init__()
        self.num_predecessors = num_predecessors
        self.levels = [Level.of(None, 0, num_items, num_slots)]
        for feature, size in enumerate(feature_sizes):
            self.levels.append(Level.of(feature, self.levels[-1].end, size, min(num_slots, FEATURE_SLOTS)))
        self.num_slots = self.levels[-1].end
        has_traces = num_traces > 0 and self.levels[0].ways > 1  # where every item has its slot, none makes room
        self.traces = Traces(num_traces, num_items, segment_events) if has_traces else None
        steps_per_s = 4.0**DECAY_BITS / torch.tensor(HALF_LIVES_S, dtype=torch.float64)
        self.register_buffer("steps_per_s", steps_per_s, persistent=False)
        steps = torch.arange(2**DECAY_BITS, dtype=torch.float64) * 2.0**-DECAY_BITS
        halvings = torch.arange(MAX_HALVINGS + 1, dtype=torch.float64)
        for name, exponent in (("whole", halvings), ("coarse", steps), ("fine", steps * 2.0**-DECAY_BITS)):
            self.register_buffer(f"left_{name}", torch.exp2(-exponent).float(), persistent=False)
        events = torch.arange(PRECEDING_EVENTS, dtype=torch.float64)
        self.register_buffer("near", torch.exp2(-events / PRECEDING_HALF_LIFE).float(), persistent=False)

    steps_per_s: Tensor
    left_whole: Tensor
    left_coarse: Tensor
    left_fine: Tensor
    near: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensors of the running value are called."""
        traces = ("trace_words", "trace_marks") if self.traces is not None else ()
        preceding = ("sketch_preceding", "sketch_newest") if self.num_predecessors else ()
        return ("sketch_entries", "sketch_decayed", "sketch_clock", *traces, *preceding)

    @property
    def num_features(self) -> int:
        """Per level: met, count, events since, seconds since, and a decayed count per half-life; what predecessors
        say; and the totals. """  # fmt: skip
        of_predecessors = len(PRECEDING_NAMES) if self.num_predecessors else 0
        return len(self.levels) * (4 + len(HALF_LIVES_S)) + of_predecessors + 4

    # -- as a memory

    def initial(self, num_users: int) -> Running:
        """The running value of an empty history."""
        return (
            torch.zeros(num_users, self.num_slots, 4, dtype=torch.int32),
            torch.zeros(num_users, self.num_slots, len(HALF_LIVES_S)),
            torch.zeros(num_users, 2, dtype=torch.int32),
            *(self.traces.initial(num_users) if self.traces is not None else ()),
            *(self._no_predecessors(num_users) if self.num_predecessors else ()),
        )

    def _no_predecessors(self, num_users: int) -> Running:
        shape = (num_users, self.levels[0].end, self.num_predecessors)
        return torch.zeros(shape, dtype=torch.int16), torch.zeros(num_users, 1, dtype=torch.int16)

    def parts(self, item: Tensor, features: Tensor, timestamp_us: Tensor, is_valid: Tensor) -> Running:
        """The entries of segments by themselves: item, timestamp_us, is_valid (G, S), features (G, S, number of them).

        Returns entries (G, J, S, 4), decayed (G, J, S, F) and clock (G, 2): how many events, the second of the last.
        The entry of a key stands where the segment has it last; anywhere else the key is 0. With predecessors also
        those of the items, (G, S, N), newest first, UNKNOWN where it lies before the segment, and the fingerprint of
        the last event, (G, 1).
        """
        key = torch.stack([self._key(level, item, features) for level in self.levels], 1) * is_valid[:, None]
        same = (key[..., :, None] == key[..., None, :]) & (key > 0)[..., None]
        is_last = (key > 0) & ~same.triu(1).any(-1)
        second = _seconds(timestamp_us)[:, None].expand_as(key)
        place = torch.arange(1, key.shape[-1] + 1, device=key.device).expand_as(key)
        entries = torch.stack([key * is_last, same.sum(-1), place, second], -1).int()
        decayed = torch.ones(*key.shape, len(HALF_LIVES_S), device=key.device)
        g, j, later, earlier = (same.tril(-1) & is_last[..., None]).nonzero(as_tuple=True)
        row = (g * key.shape[1] + j) * key.shape[2] + later
        left = self.left(second[g, j, later].long() - second[g, j, earlier])
        decayed.view(-1, len(HALF_LIVES_S)).index_add_(0, row, left.to(decayed.dtype))
        last = _seconds(timestamp_us).masked_fill(~is_valid, NEVER_SECOND).amax(1)
        clock = torch.stack([is_valid.sum(1).int(), last], -1)
        preceding = self._preceding_in_segment(item * is_valid, same[:, 0]) if self.num_predecessors else ()
        return entries, decayed, clock, *preceding

    def _preceding_in_segment(self, item: Tensor, same: Tensor) -> Running:
        """Of events item (G, S), 0 pads at the end, and which of them are the same, (G, S, S): as ``parts`` says."""
        fingerprint = fingerprints(item)
        before = torch.cat([torch.full_like(fingerprint[:, :1], UNKNOWN), fingerprint[:, :-1]], 1)
        place = torch.arange(item.shape[1], device=item.device)
        earlier = torch.where(same.tril(-1), place, -1).amax(-1)  # the event before with the same item
        event, kept = place.expand_as(item), []
        for _ in range(self.num_predecessors):
            kept.append(before.gather(1, event.clamp(min=0)) * (event >= 0))
            event = torch.where(event >= 0, earlier.gather(1, event.clamp(min=0)), -1)
        last = (item > 0).sum(1, keepdim=True) - 1
        return torch.stack(kept, -1), fingerprint.gather(1, last.clamp(min=0)) * (last >= 0)

    def fold(self, parts: Running, order: SegmentOrder, running: Running, keep: bool = True) -> tuple[Running, Running]:
        """The running value after each segment (G, ...), nothing unless ``keep``, and after the last, (B, ...)."""
        return SketchFold(self, running).fold(parts, order, keep)

    # -- as candidates read it

    def read(self, running: Running, requests: Requests, item_features: Tensor) -> Tensor:
        """Features (Q, C, num_features) as of each request; the totals as of its summary, and of its recent events.

        running (M, ...): as of the summaries; item_features (I, number of features). Events between the summary and the
        request are among the recent ones and are counted from there.
        """
        clock = running[2][requests.summary]
        now = _seconds(requests.timestamp_us)
        age_s = (now[:, None].long() - _seconds(requests.recent_us)).clamp(min=0)  # where there is no event, any
        later = _Later.of(requests, clock[:, 0], self._counted(age_s))
        features, met = [], requests.candidate.new_zeros(())
        for level in self.levels:
            candidate, recent = (
                self._key(level, item, item_features[item]) for item in (requests.candidate, requests.recent_item)
            )
            sums, newest = self._find(level, running, requests.summary, candidate, now)
            more, newer = later.of_key(candidate, recent)
            sums = sums + more
            features.append(_features(sums, torch.maximum(newest, newer), requests.num_known, now))
            met = sums[..., 0] if level.feature is None else met
        if self.num_predecessors:
            preceding = self._preceding(running, requests, later.is_later)
            features.append(self._likeness(preceding, met, requests))
        totals = torch.cat([_totals(*clock.T), _totals(*_different(requests.recent_item))], -1).to(sums.dtype)
        return torch.cat([*features, totals[:, None].expand(-1, requests.candidate.shape[1], -1)], -1)

    def _find(self, level: Level, running: Running, summary: Tensor, key: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys (Q, C): sums (Q, C, 1 + F) as of now (Q,), and the place and second of the newest event."""
        entries, decayed = running[:2]
        slot, is_met = self._slot(level, entries, summary, key)
        row = summary[:, None] * self.num_slots + slot
        entry, sums = entries.flatten(0, 1)[row], decayed.flatten(0, 1)[row]
        count, newest = entry[..., COUNT, None] * is_met, entry[..., PLACE:]
        if self.traces is not None and level.feature is None:
            clock, words, marks = running[2:5]
            trace = self.traces.find((words, marks), clock[:, 0], summary, key)
            is_trace = ~is_met & trace.is_found[..., None]
            count = torch.where(is_trace, trace.count[..., None].int(), count)
            newest = torch.where(is_trace, torch.stack([trace.place, trace.second], -1).int(), newest)
            sums = torch.where(is_trace, count.to(sums.dtype), sums)  # as if all had been met with the newest
            is_met = is_met | is_trace
        left = self.left((now[:, None].long() - newest[..., 1]).clamp(min=0)).to(sums.dtype)
        sums = torch.cat([count.to(sums.dtype), sums * left * is_met], -1)
        never = entry.new_tensor([NEVER_PLACE, NEVER_SECOND])
        return sums, torch.where(is_met, newest, never)

    def _slot(self, level: Level, entries: Tensor, summary: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The slot (Q, C) of keys (Q, C), any of their bucket where they have none; whether they have, (Q, C, 1)."""
        slots = level.slots(key)
        held = entries[..., KEY].flatten()[summary[:, None, None] * self.num_slots + slots]
        is_way = (held == key[..., None]) & (key > 0)[..., None]
        return slots.gather(-1, is_way.int().argmax(-1, keepdim=True))[..., 0], is_way.any(-1, keepdim=True)

    def _preceding(self, running: Running, requests: Requests, is_later: Tensor) -> Tensor:
        """Fingerprints (Q, C, N) of the events before the newest N with each candidate; 0 where there is none.

        is_later (Q, R): the recent events that the summary does not have. They stand before what the entry has.
        """
        item, candidate, num_kept = requests.recent_item, requests.candidate, self.num_predecessors
        stored, newest = running[-2:]
        slot, is_met = self._slot(self.levels[0], running[0], requests.summary, candidate)
        stored = stored.flatten(0, 1)[requests.summary[:, None] * stored.shape[1] + slot] * is_met
        is_first = is_later & (is_later.cumsum(1) == 1)  # its predecessor is the newest event that the summary has
        before = fingerprints(nn.functional.pad(item, (2, 0))[:, :-1])  # (Q, 1 + R): first none, then of each event
        before = torch.where(nn.functional.pad(is_first, (1, 0)), newest[requests.summary], before)
        is_same = (candidate[:, :, None] == item.masked_fill(~is_later, -1)[:, None]) & (candidate > 0)[..., None]
        place = torch.arange(1, item.shape[1] + 1, device=item.device)
        place = nn.functional.pad(is_same * place, (num_kept, 0)).topk(num_kept).values  # newest first; 0: none
        before = before[:, None].expand(-1, candidate.shape[1], -1)
        num_later = (place > 0).sum(-1, keepdim=True)
        own = torch.arange(num_kept, device=item.device)
        kept = torch.where(own < num_later, own, num_kept + own - num_later)
        return torch.cat([before.gather(2, place), stored], -1).gather(-1, kept)

    def _likeness(self, preceding: Tensor, met: Tensor, requests: Requests) -> Tensor:
        """How near the events before the newest meetings are among the newest events now, (Q, C, 3).

        preceding (Q, C, N); met (Q, C): how many meetings there were. An event is worth 2^(-its age / half-life), the
        newest 1; one of the candidate itself nothing. The mean over the newest N meetings, the largest, the newest.
        """
        is_same = self._stands_before(preceding, requests)
        worth = (is_same * self.near.to(met.dtype)).amax(-1)
        each = worth.unbind(-1)
        total = sum(each[1:], each[0])  # in this order, whatever the shape
        mean = total / met.clamp(1, self.num_predecessors)
        return torch.stack([mean, worth.amax(-1), each[0]], -1)

    def _stands_before(self, preceding: Tensor, requests: Requests) -> Tensor:
        """Whether one of the newest events is of an item that preceded: (Q, C, N, PRECEDING_EVENTS).

        preceding (Q, C, N) fingerprints. Events newest first; one of the candidate itself does not count.
        """
        newest = nn.functional.pad(requests.recent_item, (PRECEDING_EVENTS, 0))[:, -PRECEDING_EVENTS:]
        recent = fingerprints(newest.flip(1))
        own = fingerprints(requests.candidate)[..., None]
        return (preceding[..., None] == recent[:, None, None]) & ((preceding > 0) & (preceding != own))[..., None]

    def meetings_after(self, running: Running, requests: Requests) -> Tensor:
        """How many of the newest N meetings with each candidate came right after the item of each recent event.

        (Q, C, R) int64; what `read` looks at: 0 of events older than the newest PRECEDING_EVENTS.
        """
        is_later = _is_later(requests, running[2][requests.summary, 0])
        number = self._stands_before(self._preceding(running, requests, is_later), requests).sum(2).flip(-1)
        return nn.functional.pad(number, (requests.recent_item.shape[1], 0))[..., PRECEDING_EVENTS:]

    def items(self, running: Running) -> Tensor:
        """The items that the sketch of one user, running (...), has an entry or a trace of."""
        entered = running[0][: self.levels[0].end, KEY]
        traced = [] if self.traces is None else [self.traces.keys(running[3])]
        return torch.cat([entered[entered > 0].long(), *traced])

    @staticmethod
    def _key(level: Level, item: Tensor, features: Tensor) -> Tensor:
        """The key (...) of items (...) at a level; features (..., number of them)."""
        return item if level.feature is None else features[..., level.feature]

    def left(self, age_s: Tensor) -> Tensor:
        """2^(-age / half-life) of integer ages (...) >= 0, (..., F): a product of three table entries."""
        steps = (age_s.double()[..., None] * self.steps_per_s).long()
        fine = steps & (2**DECAY_BITS - 1)
        coarse = (steps >> DECAY_BITS) & (2**DECAY_BITS - 1)
        whole = (steps >> (2 * DECAY_BITS)).clamp(max=MAX_HALVINGS)
        return self.left_whole[whole] * (self.left_coarse[coarse] * self.left_fine[fine])

    def _counted(self, age_s: Tensor) -> Tensor:
        """What an event of this age counts: 1, and for each half-life what is left of it, (..., 1 + F)."""
        left = self.left(age_s)
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
        is_later, place = _is_later(requests, num_summarized), _places(requests)
        met = torch.stack([place.int() + 1, _seconds(requests.recent_us)], -1)
        return cls(is_later, value * is_later[..., None], met)

    def of_key(self, candidate: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys candidate (Q, C) among recent (Q, R): sums (Q, C, 1 + F), and the newest's place and second."""
        is_same = (candidate[:, :, None] == recent.masked_fill(~self.is_later, -1)[:, None]) & (candidate > 0)[
            ..., None
        ]
        never = self.met.new_tensor([NEVER_PLACE, NEVER_SECOND]).expand(recent.shape[0], 1, 2)
        met = torch.cat([never, self.met], 1)
        place = torch.arange(1, met.shape[1], dtype=torch.int32, device=recent.device)
        newest = (is_same * place).amax(2) if recent.shape[1] else candidate * 0
        newest = met.gather(1, newest.long()[..., None].expand(-1, -1, 2))
        return is_same.to(self.value.dtype) @ self.value, newest


def _places(requests: Requests) -> Tensor:
    """Places of the recent events in the history, counted from 0, (Q, R)."""
    size = requests.recent_item.shape[1]
    return requests.num_known[:, None] - size + torch.arange(size, device=requests.num_known.device)


def _is_later(requests: Requests, num_summarized: Tensor) -> Tensor:
    """Whether a recent event is one that the request's summary does not have, (Q, R)."""
    return (_places(requests) >= num_summarized[:, None]) & (requests.recent_item > 0)


def fingerprints(item: Tensor) -> Tensor:
    """Of items (...) int64 from 1 on: int16 from 1 to 2^15 - 1; of 0, which is no item, 0."""
    hashed = ((item * MULTIPLIER) >> (64 - HASH_BITS)) & (2**HASH_BITS - 1)
    return ((hashed % (2**FINGERPRINT_BITS - 1) + 1) * (item > 0)).to(torch.int16)


def _different(item: Tensor) -> tuple[Tensor, Tensor]:
    """Of events (Q, R), item 0 where there is none: how many there are, and how many different items, (Q,) each."""
    ordered = torch.cat([torch.zeros_like(item[:, :1]), item], 1).sort(1).values
    return (item > 0).sum(1), (ordered.diff(dim=1) > 0).sum(1)


def _totals(num_events: Tensor, num_different: Tensor) -> Tensor:
    """Log of how many different items, and the share of events whose item was met before, (Q, 2)."""
    return torch.stack([num_different.log1p(), 1 - num_different / num_events.clamp(min=1)], -1)


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
