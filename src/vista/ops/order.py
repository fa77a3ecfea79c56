"""Whose segments are folded in which order: what ragged batches of users share.

Shape letters: B users, G segments (of all users together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentOrder:
    """Which user each segment belongs to, and in which order segments are folded.

    first         (B,) int64, in main memory: the first segment of each user; a user's segments stand in time order
    num_segments  (B,) int64, in main memory
    """

    first: Tensor
    num_segments: Tensor

    @classmethod
    def of(cls, num_segments: Tensor) -> SegmentOrder:
        """From the number of segments of each user, (B,) int64, segments lying user after user."""
        num_segments = num_segments.to(torch.int64).cpu()
        return cls(num_segments.cumsum(0) - num_segments, num_segments)

    @property
    def num_users(self) -> int:
        return len(self.num_segments)

    @cached_property
    def user(self) -> Tensor:
        """The user of each segment, (G,) int64, in main memory."""
        return torch.repeat_interleave(torch.arange(self.num_users), self.num_segments)

    @cached_property
    def ordinal(self) -> Tensor:
        """The place of each segment among its user's, (G,) int64, in main memory."""
        return torch.arange(len(self.user)) - self.first[self.user]

    @cached_property
    def steps(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each j: the rows of the j-th segments of all users that have that many, and those users."""
        steps = []
        for j in range(int(self.num_segments.max()) if self.num_users else 0):
            active = (self.num_segments > j).nonzero().squeeze(1)
            steps.append((self.first[active] + j, active))
        return tuple(steps)

    def scan(
        self,
        merge: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]],
        initial: Sequence[Tensor],
        parts: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Fold each user's segments one after another: the running value after each segment, and after the last.

        merge    combines a running value with a segment's part; both are tuples of tensors, users in the first
        dimension
        initial  (B, ...) each;  parts  (G, ...) each.  Returns ((G, ...) each, (B, ...) each).

        Always in time order and never as a parallel prefix sum, so that the result does not depend on how a history was
        cut into calls: the same additions happen in the same order.
        """
        running = tuple(initial)
        after_segment: list[tuple[Tensor, ...]] = []
        device = parts[0].device
        for rows, users in ((rows.to(device), users.to(device)) for rows, users in self.steps):
            everyone = len(users) == self.num_users
            now = running if everyone else tuple(value[users] for value in running)
            now = merge(now, tuple(part[rows] for part in parts))
            running = (
                now
                if everyone
                else tuple(value.index_copy(0, users, new) for value, new in zip(running, now, strict=True))
            )
            after_segment.append(now)
        if not after_segment:
            return tuple(value[:0] for value in running), running
        place = torch.argsort(torch.cat([rows for rows, _ in self.steps])).to(device)
        return tuple(torch.cat(values)[place] for values in zip(*after_segment, strict=True)), running
