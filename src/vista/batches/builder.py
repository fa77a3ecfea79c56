"""Plans to batches.

Nothing at or after a request is used: a border lies at or before ``num_known``, recent events end at it.

Shape letters: B lanes, N event rows, G segments, S events in a segment, Q requests, C candidates, R recent events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.batches.plans import Drawn, Feed, Plan, Stretch
from vista.models.batch import Borders, Requests, TimelineBatch, Windows
from vista.models.inputs import Events, Progress, ragged_arange

WINDOWS_PER_STEP = 32  # most reconstruction windows of one step


@dataclass
class Step:
    """One batch, the users of its lanes, which of them continue from carried memory, and which go on after it."""

    batch: TimelineBatch
    users: list[int]
    is_carried: Sequence[bool]
    goes_on: Sequence[bool]
    position: dict[str, Any] = field(default_factory=dict)  # of the walk after this step, to resume from

    def to(self, device: torch.device) -> Step:
        """The same with its batch there."""
        return self if device.type == "cpu" else replace(self, batch=self.batch.to(device))


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

    @property
    def lane(self) -> np.ndarray:
        """The lane of each request, (Q,)."""
        return np.repeat(np.arange(len(self.user)), self.end_request - self.first_request)

    @property
    def request(self) -> np.ndarray:
        """Each request's row in the impressions, (Q,)."""
        return ragged_arange(self.first_request, self.end_request - self.first_request)


class BatchBuilder:
    """Plans to batches; numpy over all lanes at once. Building draws nothing: any process can build any lane."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.model, self.train = feed.config.model, feed.config.train

    def draw(self, stretches: Sequence[Stretch], rng: np.random.Generator) -> Drawn:
        """What is random about a step of these stretches."""
        rows = self._rows(stretches)
        lane, request = rows.lane, rows.request
        known = self.feed.impressions.num_known[request].astype(np.int64)
        return Drawn(self._choose_border(known, lane, rows, rng), *self._draw_windows(rows, rng))

    def step(self, plan: Plan) -> Step:
        """The batch of a plan, with what else a step is."""
        users = [stretch.user for stretch in plan.stretches]
        return Step(self.build(plan), users, plan.is_carried, plan.goes_on, plan.position)

    def build(self, plan: Plan) -> TimelineBatch:
        rows, drawn = self._rows(plan.stretches), plan.drawn
        events = self._events(rows)
        num_segments = rows.last_segment - rows.first_segment
        lane, request = rows.lane, rows.request
        known = self.feed.impressions.num_known[request].astype(np.int64)
        all_lanes, all_borders = np.append(lane, drawn.window_lane), np.append(drawn.border, drawn.window_border)
        borders, border_of = self._borders(all_lanes, all_borders, rows, num_segments)
        requests, label, impression = self._requests(request, lane, known, border_of[: len(request)], rows)
        return TimelineBatch(
            events=events,
            segment=torch.from_numpy(self._segment_index(rows, num_segments)),
            num_segments=torch.from_numpy(num_segments),
            borders=borders,
            requests=requests,
            label=label,
            impression=impression,
            windows=self._windows(drawn.window_lane, drawn.window_start, border_of[len(request) :], rows),
        )

    def _rows(self, stretches: Sequence[Stretch]) -> Rows:
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

    def _choose_border(self, known: np.ndarray, lane: np.ndarray, rows: Rows, rng: np.random.Generator) -> np.ndarray:
        """The segment border whose summary each request reads: the newest, or in training one a little older."""
        newest = known // self.model.segment_events
        if not self.feed.train:
            return newest
        stale = rng.integers(0, self.train.max_stale_segments + 1, len(newest))
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

    def _draw_windows(self, rows: Rows, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reconstruction windows: lane, border (segment) and first event within the history, each (P,)."""
        nothing = np.zeros(0, np.int64)
        if not self.feed.train or self.train.reconstruction_weight == 0 or self.model.kind != "vista":
            return nothing, nothing, nothing
        long_enough = rows.last_segment * self.model.segment_events >= self.train.reconstruction_events
        lane = np.flatnonzero(long_enough & (rows.last_segment > rows.first_segment))
        if not len(lane):
            return nothing, nothing, nothing
        lane = rng.choice(lane, min(WINDOWS_PER_STEP, 4 * len(lane)))
        lowest = -(-self.train.reconstruction_events // self.model.segment_events)
        segment = rng.integers(np.maximum(rows.first_segment[lane] + 1, lowest), rows.last_segment[lane] + 1)
        start = rng.integers(0, segment * self.model.segment_events - self.train.reconstruction_events + 1)
        return lane, segment, start

    def _windows(self, lane: np.ndarray, start: np.ndarray, border: np.ndarray, rows: Rows) -> Windows | None:
        if not len(lane):
            return None
        length = self.train.reconstruction_events
        events = self._read_events(rows.history_start[lane] + start, np.full(len(lane), length), start > 0)
        index = np.arange(len(lane) * length).reshape(len(lane), length)
        return Windows(events, torch.from_numpy(index), torch.from_numpy(border.astype(np.int64)))
