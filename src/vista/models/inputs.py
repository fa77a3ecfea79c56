"""What models read: events, states and batches, as named groups of tensors.

Shape letters: B users (or lanes of a batch), N events (all users together), S events in a segment, G segments,
K summary tokens, R recent events, Q requests, C candidates, T tasks, X context columns, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

US_PER_S = 1_000_000
NO_GAP_US = -1  # the gap of a user's first event


class TensorGroup:
    """Mixin for dataclasses of tensors and of such groups: the same operation on every one of them."""

    def to(self, device: torch.device | str) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | TensorGroup)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Events(TensorGroup):
    """Events of B users, user after user, each in time order.

    item (N,) int64 item index; action (N,) int64; timestamp_us (N,) int64;
    gap_us (N,) int64: time since the user's event before, NO_GAP_US for the first;
    offsets (B + 1,) int64: the events of user b are offsets[b] : offsets[b + 1].
    """

    item: Tensor
    action: Tensor
    timestamp_us: Tensor
    gap_us: Tensor
    offsets: Tensor

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        return self.offsets.diff()

    @classmethod
    def from_log(
        cls, item: Tensor, action: Tensor, timestamp_us: Tensor, offsets: Tensor, previous_us: Tensor | None = None
    ) -> Events:
        """From what a log holds; gaps are computed here.

        previous_us (B,) int64: the timestamp of the event before each user's first one here, negative where there is
        none.
        """
        timestamp_us = timestamp_us.to(torch.int64)
        gap_us = torch.diff(timestamp_us, prepend=timestamp_us[:1])
        starts = offsets[:-1][offsets.diff() > 0]
        gap_us[starts] = NO_GAP_US
        if previous_us is not None:
            known = previous_us[offsets.diff() > 0]
            gap_us[starts] = torch.where(known >= 0, timestamp_us[starts] - known, NO_GAP_US)
        return cls(item.to(torch.int64), action.to(torch.int64), timestamp_us, gap_us, offsets.to(torch.int64))


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then the same for starts[1], and so on; int64."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)


def ragged_index(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Rows starts[i] .. starts[i] + lengths[i] - 1, (n, width) int64, padded with -1 behind."""
    column = torch.arange(width, device=starts.device)
    return torch.where(column < lengths[:, None], starts[:, None] + column, -1)


def newest_index(ends: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The last ``width`` of the rows ends[i] - lengths[i] .. ends[i] - 1, newest last, padded with -1 in front."""
    column = torch.arange(-width, 0, device=ends.device)
    return torch.where(column >= -lengths[:, None], ends[:, None] + column, -1)


@dataclass(frozen=True)
class Recent(TensorGroup):
    """Each user's newest raw events, newest last: item, action, timestamp_us, gap_us, (B, R) int64 each; 0 pads."""

    item: Tensor
    action: Tensor
    timestamp_us: Tensor
    gap_us: Tensor

    @classmethod
    def empty(cls, num_users: int, size: int, device: torch.device | str = "cpu") -> Recent:
        return cls(*(torch.zeros(num_users, size, dtype=torch.int64, device=device) for _ in range(4)))

    def push(self, events: Events) -> Recent:
        """The newest R events after these have happened."""
        size = self.item.shape[1]
        lengths = events.lengths()
        index = newest_index(events.offsets[1:], lengths, size)
        kept = torch.arange(size, device=index.device) + lengths[:, None]  # where an old event moved from
        from_old = index < 0

        def merge(old: Tensor, new: Tensor) -> Tensor:
            moved = old.gather(1, kept.clamp(max=size - 1))
            return moved if not len(new) else torch.where(from_old, moved, new[index.clamp(min=0)])

        return Recent(*(merge(getattr(self, f.name), getattr(events, f.name)) for f in fields(self)))

    def newest(self, counts: Tensor) -> Events:
        """The newest counts[b] events of each user, as events."""
        size = self.item.shape[1]
        rows = torch.arange(len(counts), device=counts.device)[:, None] * size
        chosen = (torch.arange(size, device=counts.device) >= size - counts[:, None]).flatten()
        index = (rows + torch.arange(size, device=counts.device)).flatten()[chosen]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Events(**{f.name: getattr(self, f.name).flatten()[index] for f in fields(self)}, offsets=offsets)


@dataclass(frozen=True)
class Progress(TensorGroup):
    """How far each user's history has been read: what seeds are told about its size, and where a stream goes on.

    num_events (B,), first_us (B,), last_us (B,): int64; times are -1 before the first event.
    """

    num_events: Tensor
    first_us: Tensor
    last_us: Tensor

    @classmethod
    def start(cls, num_users: int, device: torch.device | str = "cpu") -> Progress:
        count = torch.zeros(num_users, dtype=torch.int64, device=device)
        return cls(count, count - 1, count - 1)

    def advance(self, events: Events) -> Progress:
        lengths = events.lengths()
        if not len(events.item):
            return self
        first = events.timestamp_us[events.offsets[:-1].clamp(max=len(events.item) - 1)]
        last = events.timestamp_us[(events.offsets[1:] - 1).clamp(min=0)]
        grows = lengths > 0
        return Progress(
            self.num_events + lengths,
            torch.where(grows & (self.num_events == 0), first, self.first_us),
            torch.where(grows, last, self.last_us),
        )
