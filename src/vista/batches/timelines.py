"""Batches over user timelines: one pass over a history serves all of its impressions.

A *lane* walks along one user's history. In each step it advances by a *stretch* of at most ``window_segments``
segments, and the requests that fall into the stretch are scored from the summaries at its borders and the recent
events before them. The memory is carried from stretch to stretch without gradient, so an event is read once per epoch
however many impressions come after it, and the cost of an impression does not depend on the length of its history.

Shape letters: B lanes, Q requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.batches.builder import BatchBuilder, Step
from vista.batches.plans import Feed, Plan, Stretch
from vista.models.batch import Memory, flatten, unflatten


@dataclass
class Lane:
    """Where on a user's timeline the next stretch begins: at a segment border, with a request.

    process: which of the processes that train together carries its memory.
    """

    user: int
    segment: int
    request: int
    end_request: int
    process: int = 0


class TimelineWalk:
    """Iterates over one epoch's steps; its ``position`` is small, JSON-able and exact to resume from.

    num_processes: how many processes share the lanes of each step. All of them walk alike, so that all know the same
    plans, whatever their number.
    """

    def __init__(self, feed: Feed, seed: int = 0, epoch: int = 0, num_processes: int = 1) -> None:
        self.feed, self.num_processes = feed, num_processes
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
            "lanes": [list(vars(lane).values()) for lane in self.lanes],
            "rng": self.rng.bit_generator.state,
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Go on from a position of a walk with the same feed and seed."""
        assert position["epoch"] == self.epoch
        self.next_user = position["next_user"]
        self.lanes = [Lane(*values) for values in position["lanes"]]
        for lane in self.lanes:  # the number of processes may have changed
            lane.process %= self.num_processes
        self.rng.bit_generator.state = position["rng"]

    @property
    def num_requests(self) -> int:
        return int((self._ends - self._starts).sum())

    def __iter__(self) -> Iterator[Step]:
        builder = BatchBuilder(self.feed)
        for plan in self.plans():
            yield builder.step(plan)

    def plans(self) -> Iterator[Plan]:
        """The epoch's steps, not yet built."""
        builder = BatchBuilder(self.feed)
        while self.lanes or self.next_user < len(self.order):
            lanes, stretches, is_carried = self._advance()
            drawn = builder.draw(stretches, self.rng)
            goes_on = [lane.request < lane.end_request for lane in lanes]
            yield Plan(stretches, is_carried, goes_on, [lane.process for lane in lanes], drawn, self.position)

    def _advance(self) -> tuple[list[Lane], list[Stretch], list[bool]]:
        """Move lanes until the step is full: those under way first, then new users."""
        requests_left, segments_left = (
            self.feed.config.train.requests_per_step,
            self.feed.config.train.segments_per_step,
        )
        moved, stretches, is_carried, load = [], [], [], np.zeros(self.num_processes)
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
            if is_new:  # to whoever has least to do so far
                lane.process = int(load.argmin())
            load[lane.process] += self.feed.work(stretch)
            if lane.request < lane.end_request:
                self.lanes.append(lane)
            moved.append(lane)
            stretches.append(stretch)
            is_carried.append(not is_new)
            requests_left -= stretch.num_requests
            segments_left -= stretch.num_segments
        self.lanes = waiting + self.lanes  # those that found no room go first next time
        return moved, stretches, is_carried

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

    def load(self, state: dict[str, Tensor], users: set[int]) -> None:
        """What ``state`` gave, of these users."""
        self.by_user = {}
        for name in sorted(state, key=lambda name: tuple(map(int, name.split(".")))):
            if int(name.split(".")[0]) in users:
                self.by_user.setdefault(int(name.split(".")[0]), []).append(state[name])
