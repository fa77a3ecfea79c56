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
    def steps(self) -> tuple[Tensor | None, ...]:
        """For each j: the users that have a j-th segment, int64, in main memory; None for everyone."""
        most = int(self.num_segments.max()) if self.num_users else 0
        active = [(self.num_segments > j).nonzero().squeeze(1) for j in range(most)]
        return tuple(None if len(users) == self.num_users else users for users in active)

    @cached_property
    def sizes(self) -> list[int]:
        """How many users each step has."""
        return [self.num_users if users is None else len(users) for users in self.steps]

    @cached_property
    def place(self) -> Tensor | None:
        """The segments step by step, (G,) int64, in main memory; None where they stand so already (one user)."""
        rows = [(self.first if users is None else self.first[users]) + j for j, users in enumerate(self.steps)]
        place = torch.cat(rows) if rows else self.first[:0]
        return None if torch.equal(place, torch.arange(len(place))) else place

    def by_step(self, value: Tensor) -> tuple[Tensor, ...]:
        """Values (G, ...) of segments to those of each step."""
        value = value if self.place is None else value[self.place.to(value.device)]
        return value.split(self.sizes)

    def by_segment(self, value: Tensor) -> Tensor:
        """The reverse, of the steps' values one after another (G, ...)."""
        return value if self.place is None else value[torch.argsort(self.place).to(value.device)]

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
        now, after_steps = tuple(initial), []
        if not self.steps:
            return tuple(value[:0] for value in now), now
        everyone = torch.arange(self.num_users)
        before = everyone
        for step, users in zip(zip(*map(self.by_step, parts), strict=True), self.steps, strict=True):
            active = everyone if users is None else users
            if len(active) < len(before):  # who has no further segment had none later either
                kept = torch.isin(before, active).to(now[0].device)
                now = tuple(value[kept] for value in now)
            now, before = merge(now, step), active
            after_steps.append(now)
        after = tuple(self.by_segment(torch.cat(values)) for values in zip(*after_steps, strict=True))
        if self.steps[-1] is None:
            return after, now
        some = self.num_segments > 0
        ends = (self.first + self.num_segments - 1)[some].to(now[0].device)
        some = some.nonzero().squeeze(1).to(now[0].device)
        return after, tuple(value.index_copy(0, some, later[ends]) for value, later in zip(initial, after, strict=True))
