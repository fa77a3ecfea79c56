"""Batches over user timelines: one pass over a history serves all of its impressions.

A *lane* walks along one user's history. In each step it advances by a *stretch* of at most ``window_segments``
segments, and the requests that fall into the stretch are scored from the summaries at its borders and the recent
events before them. The memory is carried from stretch to stretch without gradient, so an event is read once per epoch
however many impressions come after it, and the cost of an impression does not depend on the length of its history.

Nothing at or after a request is used: a border lies at or before ``num_known``, recent events end at it.

Shape letters: B lanes, N event rows, G segments, S events in a segment, Q requests, C candidates, R recent events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.config import Config
from vista.data.histories import Histories, Impressions
from vista.models.batch import Borders, Memory, Requests, TimelineBatch, Windows, flatten, unflatten
from vista.models.inputs import Events, Progress, ragged_arange

CountFeatures = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (request rows, impression rows), (n,) each -> (n, F)
SEGMENTS_PER_STEP = 128  # most segments of one step, all lanes together: bounds memory where requests are rare
WINDOWS_PER_STEP = 32  # most reconstruction windows of one step


@dataclass(frozen=True)
class Feed:
    """What a pass over timelines reads and how.

    train: staleness and reconstruction windows are drawn, users are shuffled. Otherwise each request reads the newest
    border.
    """

    histories: Histories
    impressions: Impressions
    config: Config
    train: bool = False
    count_features: CountFeatures | None = None
    users: np.ndarray | None = None  # only these; default: all with requests

    def with_requests(self) -> np.ndarray:
        """User indices that have requests here."""
        users = np.unique(self.impressions.user)
        return users if self.users is None else np.intersect1d(users, self.users)


@dataclass
class Lane:
    """Where on a user's timeline the next stretch begins: at a segment border, with a request."""

    user: int
    segment: int
    request: int
    end_request: int


@dataclass(frozen=True)
class Stretch:
    """Segments first .. last - 1 of one user's history, and requests first_request .. end_request - 1."""

    user: int
    first_segment: int
    last_segment: int
    first_request: int
    end_request: int


@dataclass
class Step:
    """One batch, the users of its lanes, which of them continue from carried memory, and which go on after it."""

    batch: TimelineBatch
    users: list[int]
    is_carried: list[bool]
    goes_on: list[bool]
    position: dict[str, Any] = field(default_factory=dict)  # of the walk after this step, to resume from


class TimelineWalk:
    """Iterates over one epoch's steps; its ``position`` is small, JSON-able and exact to resume from."""

    def __init__(self, feed: Feed, seed: int = 0, epoch: int = 0) -> None:
        self.feed = feed
        self.seed, self.epoch = seed, epoch
        self.rng = np.random.default_rng([seed, epoch])
        self.order = feed.with_requests()
        if feed.train:
            self.order = self.rng.permutation(self.order)
        self.next_user = 0
        self.lanes: list[Lane] = []
        self._known = feed.impressions.num_known
        self._starts = np.searchsorted(feed.impressions.user, self.order)
        self._ends = np.searchsorted(feed.impressions.user, self.order, side="right")

    @property
    def position(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "next_user": self.next_user,
            "lanes": [[lane.user, lane.segment, lane.request, lane.end_request] for lane in self.lanes],
            "rng": self.rng.bit_generator.state,
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Go on from a position of a walk with the same feed and seed."""
        assert position["epoch"] == self.epoch
        self.next_user = position["next_user"]
        self.lanes = [Lane(*values) for values in position["lanes"]]
        self.rng.bit_generator.state = position["rng"]

    @property
    def num_requests(self) -> int:
        return int((self._ends - self._starts).sum())

    def __iter__(self) -> Iterator[Step]:
        while self.lanes or self.next_user < len(self.order):
            stretches, carried, goes_on = self._advance()
            batch = BatchBuilder(self.feed, self.rng).build(stretches)
            yield Step(batch, [s.user for s in stretches], carried, goes_on, self.position)

    def _advance(self) -> tuple[list[Stretch], list[bool], list[bool]]:
        """Move lanes until the step is full: those under way first, then new users."""
        requests_left, segments_left = self.feed.config.train.requests_per_step, SEGMENTS_PER_STEP
        stretches, carried, goes_on = [], [], []
        waiting, self.lanes = self.lanes, []
        while requests_left > 0 and segments_left > 0:
            if waiting:
                lane, is_new = waiting.pop(0), False
            elif self.next_user < len(self.order):
                lane, is_new = self._open_lane(), True
            else:
                break
            stretch = self._next_stretch(lane, requests_left, segments_left)
            lane.segment, lane.request = stretch.last_segment, stretch.end_request
            unfinished = lane.request < lane.end_request
            if unfinished:
                self.lanes.append(lane)
            stretches.append(stretch)
            carried.append(not is_new)
            goes_on.append(unfinished)
            requests_left -= stretch.end_request - stretch.first_request
            segments_left -= stretch.last_segment - stretch.first_segment
        self.lanes = waiting + self.lanes  # those that found no room go first next time
        return stretches, carried, goes_on

    def _open_lane(self) -> Lane:
        place = self.next_user
        self.next_user += 1
        return Lane(int(self.order[place]), 0, int(self._starts[place]), int(self._ends[place]))

    def _next_stretch(self, lane: Lane, max_requests: int, max_segments: int) -> Stretch:
        size = self.feed.config.model.segment_events
        reach = lane.segment + min(self.feed.config.train.window_segments, max_segments)
        known = self._known[lane.request : lane.end_request]
        within = int(np.searchsorted(known, reach * size))  # requests before the far border
        taken = min(within, max_requests)
        stops_at_request = taken < within or taken == len(known)
        last = int(known[taken - 1]) // size if stops_at_request else reach
        return Stretch(lane.user, lane.segment, last, lane.request, lane.request + taken)


@dataclass(frozen=True)
class Rows:
    """The stretches of a step as arrays, one entry per lane, and where each lane's events lie in the batch."""

    user: np.ndarray
    first_segment: np.ndarray
    last_segment: np.ndarray
    first_request: np.ndarray
    end_request: np.ndarray
    history_start: np.ndarray  # of the user, in the event log
    event_start: np.ndarray  # the first event of the lane in the batch, counted within the history
    offsets: np.ndarray  # of the lanes in the batch's events

    @property
    def batch_row(self) -> np.ndarray:
        """Add to an event's place in its history to get its row in the batch."""
        return self.offsets[:-1] - self.event_start


class BatchBuilder:
    """Stretches to a batch; numpy over all lanes at once."""

    def __init__(self, feed: Feed, rng: np.random.Generator) -> None:
        self.feed, self.rng = feed, rng
        self.model, self.train = feed.config.model, feed.config.train

    def build(self, stretches: list[Stretch]) -> TimelineBatch:
        rows = self._rows(stretches)
        events = self._events(rows)
        num_segments = rows.last_segment - rows.first_segment
        lane = np.repeat(np.arange(len(stretches)), rows.end_request - rows.first_request)
        request = ragged_arange(rows.first_request, rows.end_request - rows.first_request)
        known = self.feed.impressions.num_known[request].astype(np.int64)
        wanted = self._choose_border(known, lane, rows)
        window_lane, window_segment, window_start = self._draw_windows(rows)
        all_lanes, all_segments = np.append(lane, window_lane), np.append(wanted, window_segment)
        borders, border_of = self._borders(all_lanes, all_segments, rows, num_segments)
        requests, label, impression = self._requests(request, lane, known, border_of[: len(request)], rows)
        return TimelineBatch(
            events=events,
            segment=torch.from_numpy(self._segment_index(rows, num_segments)),
            num_segments=torch.from_numpy(num_segments),
            borders=borders,
            requests=requests,
            label=label,
            impression=impression,
            windows=self._windows(window_lane, window_start, border_of[len(request) :], rows),
        )

    def _rows(self, stretches: list[Stretch]) -> Rows:
        user, first_segment, last_segment, first_request, end_request = (
            np.array([getattr(s, name) for s in stretches], np.int64)
            for name in ("user", "first_segment", "last_segment", "first_request", "end_request")
        )
        size = self.model.segment_events
        known = self.feed.impressions.num_known
        last_known = np.where(end_request > first_request, known[np.maximum(end_request - 1, 0)], 0)
        event_end = np.maximum(last_segment * size, last_known)
        reads_all = self.model.kind == "vista" and self.model.scope == "full"
        reach = first_segment * size if reads_all else self.model.raw_events
        event_start = np.maximum(first_segment * size - reach, 0)
        offsets = np.concatenate([[0], np.cumsum(event_end - event_start)])
        history_start = self.feed.histories.offsets[user].astype(np.int64)
        return Rows(user, first_segment, last_segment, first_request, end_request, history_start, event_start, offsets)

    def _events(self, rows: Rows) -> Events:
        lengths = np.diff(rows.offsets)
        start = rows.history_start + rows.event_start
        return self._read_events(start, lengths, rows.event_start > 0)

    def _read_events(self, start: np.ndarray, lengths: np.ndarray, has_before: np.ndarray) -> Events:
        """Events start[i] .. start[i] + lengths[i] - 1 of the log; has_before: the one before is the same user's."""
        log = self.feed.histories
        index = ragged_arange(start, lengths)
        before = log.timestamp_us[np.maximum(start - 1, 0)] if len(log.item) else np.zeros(len(start), np.int64)
        return Events.from_log(
            torch.from_numpy(log.item[index].astype(np.int64)),
            torch.from_numpy(log.action[index].astype(np.int64)),
            torch.from_numpy(log.timestamp_us[index].astype(np.int64)),
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
            torch.from_numpy(np.where(has_before, before, -1)),
        )

    def _segment_index(self, rows: Rows, num_segments: np.ndarray) -> np.ndarray:
        size = self.model.segment_events
        segment = ragged_arange(rows.first_segment, num_segments)
        first_row = segment * size + np.repeat(rows.batch_row, num_segments)
        return first_row[:, None] + np.arange(size)

    def _choose_border(self, known: np.ndarray, lane: np.ndarray, rows: Rows) -> np.ndarray:
        """The segment border whose summary each request reads: the newest, or in training one a little older."""
        newest = known // self.model.segment_events
        if not self.feed.train:
            return newest
        stale = self.rng.integers(0, self.train.max_stale_segments + 1, len(newest))
        return np.maximum(newest - stale, rows.first_segment[lane])

    def _borders(
        self, lane: np.ndarray, segment: np.ndarray, rows: Rows, num_segments: np.ndarray
    ) -> tuple[Borders, np.ndarray]:
        """The distinct borders (lane, segment), and which of them each request or window uses."""
        width = int(rows.last_segment.max(initial=0)) + 1
        key, border_of = np.unique(lane * width + segment, return_inverse=True)
        lane, segment = key // width, key % width
        count = segment * self.model.segment_events
        log = self.feed.histories.timestamp_us
        start = rows.history_start[lane]
        is_empty = count == 0
        first_us, last_us = (
            np.where(is_empty, -1, log[np.where(is_empty, 0, place)]) if len(log) else np.full(len(count), -1)
            for place in (start, start + count - 1)
        )
        segments_before = np.cumsum(num_segments) - num_segments
        after_row = len(num_segments) + segments_before[lane] + segment - rows.first_segment[lane] - 1
        row = np.where(segment == rows.first_segment[lane], lane, after_row)
        progress = Progress(*(torch.from_numpy(np.asarray(a, np.int64)) for a in (count, first_us, last_us)))
        return Borders(torch.from_numpy(row), progress, torch.from_numpy(lane)), border_of

    def _requests(
        self, request: np.ndarray, lane: np.ndarray, known: np.ndarray, border: np.ndarray, rows: Rows
    ) -> tuple[Requests, Tensor, Tensor]:
        shown = self.feed.impressions
        first, lengths = shown.offsets[request].astype(np.int64), np.diff(shown.offsets)[request].astype(np.int64)
        width = int(lengths.max(initial=1))
        column = np.arange(width)
        is_there = column < lengths[:, None]
        impression = np.where(is_there, first[:, None] + column, -1)
        flat = impression[is_there]
        newest = np.arange(-self.model.raw_events, 0)
        place = known[:, None] + newest
        recent = np.where(place >= 0, place + rows.batch_row[lane][:, None], -1)
        log_row = np.maximum(place, 0) + rows.history_start[lane][:, None]

        def of_recent(log: np.ndarray) -> Tensor:
            if not len(log):
                return torch.from_numpy(np.zeros_like(place))
            values = np.where(place >= 0, log[np.minimum(log_row, len(log) - 1)], 0)
            return torch.from_numpy(values.astype(np.int64))

        def padded(values: np.ndarray, dtype: type) -> Tensor:
            out = np.zeros((*impression.shape, *values.shape[1:]), dtype)
            out[is_there] = values[flat]
            return torch.from_numpy(out)

        requests = Requests(
            summary=torch.from_numpy(border.astype(np.int64)),
            recent=torch.from_numpy(recent),
            recent_item=of_recent(self.feed.histories.item),
            recent_us=of_recent(self.feed.histories.timestamp_us),
            timestamp_us=torch.from_numpy(shown.timestamp_us[request].astype(np.int64)),
            num_known=torch.from_numpy(known),
            candidate=padded(shown.item, np.int64),
            context=padded(shown.context, np.float32),
            counts=self._counts(np.repeat(request, lengths), flat, is_there),
        )
        return requests, padded(shown.label, np.float32), torch.from_numpy(impression)

    def _counts(self, request: np.ndarray, impression: np.ndarray, is_there: np.ndarray) -> Tensor | None:
        if self.feed.count_features is None:
            return None
        values = self.feed.count_features(request, impression)
        out = np.zeros((*is_there.shape, values.shape[1]), np.float32)
        out[is_there] = values
        return torch.from_numpy(out)

    def _draw_windows(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reconstruction windows: lane, border (segment) and first event within the history, each (P,)."""
        nothing = np.zeros(0, np.int64)
        if not self.feed.train or self.train.reconstruction_weight == 0 or self.model.kind != "vista":
            return nothing, nothing, nothing
        long_enough = rows.last_segment * self.model.segment_events >= self.train.reconstruction_events
        lane = np.flatnonzero(long_enough & (rows.last_segment > rows.first_segment))
        if not len(lane):
            return nothing, nothing, nothing
        lane = self.rng.choice(lane, min(WINDOWS_PER_STEP, 4 * len(lane)))
        lowest = -(-self.train.reconstruction_events // self.model.segment_events)
        segment = self.rng.integers(np.maximum(rows.first_segment[lane] + 1, lowest), rows.last_segment[lane] + 1)
        start = self.rng.integers(0, segment * self.model.segment_events - self.train.reconstruction_events + 1)
        return lane, segment, start

    def _windows(self, lane: np.ndarray, start: np.ndarray, border: np.ndarray, rows: Rows) -> Windows | None:
        if not len(lane):
            return None
        length = self.train.reconstruction_events
        events = self._read_events(rows.history_start[lane] + start, np.full(len(lane), length), start > 0)
        index = np.arange(len(lane) * length).reshape(len(lane), length)
        return Windows(events, torch.from_numpy(index), torch.from_numpy(border.astype(np.int64)))


class MemoryCarry:
    """The memory of lanes under way, between steps; never part of a gradient."""

    def __init__(self) -> None:
        self.by_user: dict[int, list[Tensor]] = {}

    def gather(self, step: Step, initial: Memory) -> Memory:
        """The memory (B, ...) a step starts from; ``initial``: that of B lanes at the beginning of their histories."""
        fresh = flatten(initial)
        if not fresh or not any(step.is_carried):
            return initial
        rows = [
            self.by_user[user] if carried else [t[b] for t in fresh]
            for b, (user, carried) in enumerate(zip(step.users, step.is_carried, strict=True))
        ]
        return unflatten([torch.stack(tensors) for tensors in zip(*rows, strict=True)], initial)

    def keep(self, step: Step, memory: Memory) -> None:
        """Remember the memory (B, ...) after a step, of the lanes that go on."""
        tensors = [t.detach() for t in flatten(memory)]
        for b, (user, goes_on) in enumerate(zip(step.users, step.goes_on, strict=True)):
            if goes_on:
                self.by_user[user] = [t[b].clone() for t in tensors]
            else:
                self.by_user.pop(user, None)

    def state(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        return {f"{user}.{i}": t for user, tensors in self.by_user.items() for i, t in enumerate(tensors)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.by_user = {}
        for name in sorted(state, key=lambda name: tuple(map(int, name.split(".")))):
            self.by_user.setdefault(int(name.split(".")[0]), []).append(state[name])
