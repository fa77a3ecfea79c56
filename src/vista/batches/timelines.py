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

    process: which of the processes that train together carries its memory; is_new: there is none yet.
    """

    user: int
    segment: int
    request: int
    end_request: int
    process: int = 0
    is_new: bool = True


class TimelineWalk:
    """Iterates over the steps of one epoch; in training over those of epoch after epoch, without an end.

    In training users of the next epoch follow while others of this one are under way, so that at any time steps hold
    users wherever they are on their timelines: not all at their beginnings, nor only the longest. The ``position`` is
    small, JSON-able and exact to resume from.

    num_processes: how many processes share the lanes of each step. All of them walk alike, so that all know the same
    plans, whatever their number.
    """

    def __init__(self, feed: Feed, seed: int = 0, num_processes: int = 1) -> None:
        self.feed, self.num_processes = feed, num_processes
        self.seed, self.epoch = seed, 0  # epochs begun before this one
        self.rng = np.random.default_rng([seed])
        self.order = self._new_order()
        self.next_user = 0
        self.put_off: list[int] = []  # whose turn came while they were still under way
        self.lanes: list[Lane] = []
        self._under_way: set[int] = set()  # the users of the lanes
        self._known = feed.impressions.num_known

    def _new_order(self) -> np.ndarray:
        users = self.feed.with_requests()
        return np.random.default_rng([self.seed, self.epoch]).permutation(users) if self.feed.train else users

    @property
    def position(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "next_user": self.next_user,
            "put_off": list(self.put_off),
            "lanes": [list(vars(lane).values()) for lane in self.lanes],
            "rng": self.rng.bit_generator.state,
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Go on from a position of a walk with the same feed and seed."""
        self.epoch = position["epoch"]
        self.order = self._new_order()
        self.next_user, self.put_off = position["next_user"], list(position["put_off"])
        self.lanes = [Lane(*values) for values in position["lanes"]]
        for lane in self.lanes:  # the number of processes may have changed
            lane.process %= self.num_processes
        self._under_way = {lane.user for lane in self.lanes}
        self.rng.bit_generator.state = position["rng"]

    @property
    def num_requests(self) -> int:
        """Of one epoch."""
        return int(np.isin(self.feed.impressions.user, self.order).sum())

    def __iter__(self) -> Iterator[Step]:
        builder = BatchBuilder(self.feed)
        for plan in self.plans():
            yield builder.step(plan)

    def plans(self) -> Iterator[Plan]:
        """The steps, not yet built."""
        builder = BatchBuilder(self.feed)
        while True:
            lanes, stretches, is_carried = self._advance()
            if not lanes:
                return
            drawn = builder.draw(stretches, self.rng)
            goes_on = [lane.request < lane.end_request for lane in lanes]
            yield Plan(stretches, is_carried, goes_on, [lane.process for lane in lanes], drawn, self.position)

    def _advance(self) -> tuple[list[Lane], list[Stretch], list[bool]]:
        """Move lanes until the step is full: those in turn, then new users."""
        settings = self.feed.config.train
        requests_left, segments_left = settings.requests_per_step, settings.segments_per_step
        waiting, most = self._in_turn(), self._most_requests_of_one()
        moved, stretches, is_carried, load = [], [], [], np.zeros(self.num_processes)
        while requests_left > 0 and segments_left > 0 and (lane := waiting.pop(0) if waiting else self._open_lane()):
            stretch = self._next_stretch(lane, min(requests_left, most), segments_left)
            lane.segment, lane.request = stretch.last_segment, stretch.end_request
            if lane.is_new:  # to whoever has least to do so far
                lane.process = int(load.argmin())
            load[lane.process] += self.feed.work(stretch)
            is_carried.append(not lane.is_new)
            lane.is_new = False
            moved.append(lane)
            stretches.append(stretch)
            requests_left -= stretch.num_requests
            segments_left -= stretch.num_segments
        unfinished = [lane for lane in moved if lane.request < lane.end_request]
        self._under_way -= {lane.user for lane in moved} - {lane.user for lane in unfinished}
        self.lanes = waiting + unfinished  # those that found no room go first next time
        return moved, stretches, is_carried

    def _in_turn(self) -> list[Lane]:
        """Lanes in the order in which they move: as they wait; in training drawn, by how many requests they have left,
        among ``open_users``."""
        if not self.feed.train:
            return self.lanes
        while len(self.lanes) < self.feed.config.train.open_users and (lane := self._open_lane()):
            self.lanes.append(lane)
        left = np.array([lane.end_request - lane.request for lane in self.lanes])
        return [self.lanes[place] for place in np.argsort(self.rng.exponential(size=len(left)) / left)]

    def _most_requests_of_one(self) -> int:
        """Requests that one lane may take of a step, so that there are ``users_per_step``, or as many as there are."""
        settings = self.feed.config.train
        users = min(settings.users_per_step, len(self.lanes)) if self.feed.train else 1
        return -(-settings.requests_per_step // max(users, 1))

    def _open_lane(self) -> Lane | None:
        """The lane of the next user; None where there is none."""
        user = self._next_user()
        if user is None:
            return None
        self._under_way.add(user)
        first, end = np.searchsorted(self.feed.impressions.user, [user, user + 1]).tolist()
        return Lane(user, 0, first, end)

    def _next_user(self) -> int | None:
        """The next one in order. Who is still under way from the last epoch is put off until that has ended."""
        for user in self.put_off:
            if user not in self._under_way:
                self.put_off.remove(user)
                return user
        for user in self._in_order():
            if user not in self._under_way:
                return user
            if user not in self.put_off:
                self.put_off.append(user)
        return None

    def _in_order(self) -> Iterator[int]:
        """Users of this epoch; in training, unless all are under way, of the next one when they are through."""
        while True:
            while self.next_user < len(self.order):
                self.next_user += 1
                yield int(self.order[self.next_user - 1])
            if not self.feed.train or len(self._under_way) == len(self.order):
                return
            self.epoch, self.next_user = self.epoch + 1, 0
            self.order = self._new_order()

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
        """All of it by name, in main memory, for a checkpoint."""
        return {f"{user}.{i}": t.cpu() for user, tensors in self.by_user.items() for i, t in enumerate(tensors)}

    def load(self, state: dict[str, Tensor], users: set[int], device: torch.device) -> None:
        """What ``state`` gave, of these users, to ``device``."""
        self.by_user = {}
        for name in sorted(state, key=lambda name: tuple(map(int, name.split(".")))):
            if int(name.split(".")[0]) in users:
                self.by_user.setdefault(int(name.split(".")[0]), []).append(state[name].to(device))
