"""States that can be taken back: to the newest closed border, to a kept one, or to the start, and on from there.

One way serves a new event, a late one and a removed one: go back to a border, then read the events after it in their
order. Only how far back differs. The open segment is held raw and no part of the memory, so that going back to the
newest closed border costs nothing.

Shape letters: B users, R recent events, N events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from vista.models.batch import Memory, flatten, unflatten
from vista.models.borders import Border, KeptBorders, Spacing
from vista.models.inputs import Events, Progress, Recent, ragged_arange
from vista.models.summarizer import UserState
from vista.models.vista import SequenceModel
from vista.updates.order import UNKNOWN_ID, Arrivals


@dataclass(frozen=True)
class Tracked:
    """States of B users with what putting events in order needs.

    event_id (B, R) int64: of the recent events, as ``vista.updates.order`` has them; borders: each user's kept ones.
    """

    state: UserState
    event_id: np.ndarray
    borders: tuple[KeptBorders, ...]

    @classmethod
    def of(cls, state: UserState) -> Tracked:
        """A state of which neither event ids nor borders were kept."""
        unknown = np.full(tuple(state.recent.item.shape), UNKNOWN_ID, np.int64)
        return cls(state, unknown, (KeptBorders(),) * state.num_users)

    @property
    def num_events(self) -> np.ndarray:
        """(B,) int64."""
        return self.state.progress.num_events.numpy()

    @property
    def num_held(self) -> np.ndarray:
        """How many of its newest events each state holds raw, (B,) int64."""
        return np.minimum(self.num_events, self.event_id.shape[1])

    def held(self) -> tuple[Arrivals, np.ndarray]:
        """The events held raw, by user and in order, and the place of each in its history, both (N,)."""
        size, recent = self.event_id.shape[1], self.state.recent
        user, column = np.nonzero(np.arange(size) >= size - self.num_held[:, None])
        item, action, timestamp_us = (
            t.numpy()[user, column] for t in (recent.item, recent.action, recent.timestamp_us)
        )
        events = Arrivals(user.astype(np.int64), item, action, timestamp_us, self.event_id[user, column])
        return events, self.num_events[user] - size + column

    def closed(self, segment_events: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest closed border of each user: events before it and the time of the last one (-1: none), (B,)."""
        num_open = self.num_events % segment_events
        num_closed = self.num_events - num_open
        column = np.maximum(self.event_id.shape[1] - 1 - num_open, 0)
        last_us = np.take_along_axis(self.state.recent.timestamp_us.numpy(), column[:, None], 1)[:, 0]
        return num_closed, np.where(num_closed > 0, last_us, -1)


def start_border(model: SequenceModel) -> Border:
    """Where every history starts."""
    return Border(0, -1, -1, 0, tuple(t[0] for t in flatten(model.init_state(1).memory)))


@torch.no_grad()
def refold(
    model: SequenceModel, tracked: Tracked, bases: Sequence[Border | None], tail: Arrivals, spacing: Spacing | None,
    alone: bool = False,
) -> Tracked:  # fmt: skip
    """The states after going back to ``bases`` and reading ``tail``.

    bases: one per user, None for its newest closed border. tail: all events after the bases, by user and in order;
    ``tail.user`` are rows of ``tracked``. spacing: borders that are passed and belong to the kept ones are kept. alone:
    as ``Summarizer.extend`` has it.
    """
    before, event_id = rewind(model, tracked, bases)
    plan = _Plan.of(model, tracked, before, tail, spacing)
    passed: list[list[Border]] = [plan.border_here(user, before) for user in range(before.num_users)]
    state = before
    for step in range(plan.num_steps):
        state = model.extend(state, plan.part(step, tail), alone)
        for user in plan.users_at_a_border(step):
            passed[user] += plan.border_reached(user, step, state, bases[user])
    borders = tuple(
        kept.after_replay(int(plan.base_events[user]), passed[user], plan.kept_events[user])
        for user, kept in enumerate(tracked.borders)
    )
    return Tracked(state, _push(event_id, tail.event_id, plan.tail_offsets), borders)


def rewind(model: SequenceModel, tracked: Tracked, bases: Sequence[Border | None]) -> tuple[UserState, np.ndarray]:
    """The states as of their bases, and the event ids of the events they still hold, (B, R).

    A base further back than the held events leaves the recent events empty: what is read next fills them.
    """
    num_events, last_us = tracked.closed(model.config.segment_events)
    first_us = np.where(num_events > 0, tracked.state.progress.first_us.numpy(), -1)
    memory = [t.clone() for t in flatten(tracked.state.memory)]
    for user, base in enumerate(bases):
        if base is not None:
            num_events[user], first_us[user], last_us[user] = base.num_events, base.first_us, base.last_us
            for tensor, row in zip(memory, base.memory, strict=True):
                tensor[user] = row
    shift = tracked.num_events - num_events
    recent = tracked.state.recent
    moved = {f.name: torch.from_numpy(_shift(getattr(recent, f.name).numpy(), shift, 0)) for f in fields(Recent)}
    progress = Progress(*(torch.from_numpy(array.copy()) for array in (num_events, first_us, last_us)))
    state = UserState(progress, Recent(**moved), unflatten(memory, tracked.state.memory))
    return state, _shift(tracked.event_id, shift, UNKNOWN_ID)


@dataclass(frozen=True)
class _Plan:
    """Where reading the tails pauses, so that borders on the way can be kept. Everything by user.

    base_events: events before the tail; held_us: times of the events before it that are held, in order; stops: borders
    to keep, in closed segments; kept_events: those that stay kept in the end, in events.
    """

    segment_events: int
    base_events: np.ndarray
    tail_offsets: np.ndarray
    tail_us: np.ndarray
    held_us: list[np.ndarray]
    stops: list[list[int]]
    kept_events: list[set[int]]

    @classmethod
    def of(
        cls, model: SequenceModel, tracked: Tracked, before: UserState, tail: Arrivals, spacing: Spacing | None
    ) -> _Plan:
        size, num_users = model.config.segment_events, before.num_users
        base_events = before.progress.num_events.numpy()
        offsets = np.searchsorted(tail.user, np.arange(num_users + 1))
        closed = (base_events + np.diff(offsets)) // size
        kept = [spacing.kept(int(n)) if spacing is not None else [] for n in closed]
        stops = [[k for k in ks if k * size > n] for ks, n in zip(kept, base_events, strict=True)]
        num_held = np.maximum(tracked.num_held - (tracked.num_events - base_events), 0)
        times = before.recent.timestamp_us.numpy()
        held_us = [row[len(row) - n :] for row, n in zip(times, num_held, strict=True)]
        return cls(
            size, base_events, offsets, tail.timestamp_us, held_us, stops, [{k * size for k in ks} for ks in kept]
        )

    @property
    def num_steps(self) -> int:
        return max(map(len, self.stops), default=0) + 1

    def users_at_a_border(self, step: int) -> list[int]:
        return [user for user, stops in enumerate(self.stops) if step < len(stops)]

    def part(self, step: int, tail: Arrivals) -> Events:
        """What every user reads in one step: up to its next stop, and in the last one to the end."""
        starts, ends = self._reached(step - 1), self._reached(step)
        rows = ragged_arange(starts, ends - starts)
        item, action, timestamp_us = (torch.from_numpy(c[rows]) for c in (tail.item, tail.action, tail.timestamp_us))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(ends - starts)]))
        return Events.from_log(item, action, timestamp_us, offsets)

    def _reached(self, step: int) -> np.ndarray:
        """The row of the tail each user has reached after a step, (B,)."""
        reached = []
        for user, stops in enumerate(self.stops):
            start, end = self.tail_offsets[user : user + 2]
            if step < 0:
                reached.append(start)
            else:
                at_stop = step < len(stops)
                reached.append(start + stops[step] * self.segment_events - self.base_events[user] if at_stop else end)
        return np.array(reached, np.int64)

    def border_here(self, user: int, before: UserState) -> list[Border]:
        """The border the tail starts from, where it is to be kept and its ties are known; else nothing."""
        num_events = int(self.base_events[user])
        if num_events not in self.kept_events[user]:
            return []
        ties = _ties(self.held_us[user], reaches_start=len(self.held_us[user]) == num_events)
        return [] if ties is None else [_border_of(before, user, ties)]

    def border_reached(self, user: int, step: int, state: UserState, base: Border | None) -> list[Border]:
        """The border at a stop, where its ties are known; else nothing: one time fills more than what is held."""
        start = self.tail_offsets[user]
        tail_us = self.tail_us[start : self._reached(step)[user]]
        if base is not None:
            ties = _ties(tail_us, reaches_start=True)
            assert ties is not None
            ties += base.num_ties if ties == len(tail_us) and base.last_us == tail_us[-1] else 0
        else:
            held = self.held_us[user]
            ties = _ties(np.concatenate([held, tail_us]), reaches_start=len(held) == self.base_events[user])
        return [] if ties is None else [_border_of(state, user, ties)]


def _ties(times_us: np.ndarray, reaches_start: bool) -> int | None:
    """How many of the last events have the time of the very last; None where earlier ones, not given, may have it."""
    other = np.flatnonzero(times_us != times_us[-1]) if len(times_us) else np.zeros(0, np.int64)
    if len(other):
        return len(times_us) - 1 - int(other[-1])
    return len(times_us) if reaches_start else None


def _border_of(state: UserState, user: int, num_ties: int) -> Border:
    progress = state.progress
    num_events, first_us, last_us = (int(t[user]) for t in (progress.num_events, progress.first_us, progress.last_us))
    return Border(num_events, first_us, last_us, num_ties, tuple(t[user].clone() for t in flatten(state.memory)))


def _shift(values: np.ndarray, by: np.ndarray, fill: int) -> np.ndarray:
    """Rows (B, R) moved to the right by ``by`` (B,) places; ``fill`` takes the places that become free."""
    column = np.arange(values.shape[1]) - by[:, None]
    return np.where(column >= 0, np.take_along_axis(values, np.maximum(column, 0), 1), fill)


def _push(held: np.ndarray, new: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The newest R of each row of held (B, R) followed by new[offsets[b] : offsets[b + 1]]."""
    size = held.shape[1]
    column = np.arange(size) + np.diff(offsets)[:, None]  # in held and new, one behind the other
    old = np.take_along_axis(held, np.minimum(column, size - 1), 1)
    if not len(new):
        return old
    return np.where(column < size, old, new[np.clip(offsets[:-1, None] + column - size, 0, len(new) - 1)])


def take_users(tracked: Tracked, rows: np.ndarray) -> Tracked:
    """Some of the users."""
    index = torch.from_numpy(rows)
    state = tracked.state
    progress = Progress(*(getattr(state.progress, f.name)[index] for f in fields(Progress)))
    recent = Recent(*(getattr(state.recent, f.name)[index] for f in fields(Recent)))
    memory: Memory = unflatten([t[index] for t in flatten(state.memory)], state.memory)
    borders = tuple(tracked.borders[row] for row in rows.tolist())
    return replace(tracked, state=UserState(progress, recent, memory), event_id=tracked.event_id[rows], borders=borders)


def put_users(tracked: Tracked, rows: np.ndarray, changed: Tracked) -> Tracked:
    """``tracked`` with ``changed`` in the place of some of its users."""
    index = torch.from_numpy(rows)
    state, new = tracked.state, changed.state

    def put(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return old.index_copy(0, index, values)

    def each(old: Progress | Recent, values: Progress | Recent) -> dict[str, torch.Tensor]:
        return {f.name: put(getattr(old, f.name), getattr(values, f.name)) for f in fields(old)}

    memory = [put(old, values) for old, values in zip(flatten(state.memory), flatten(new.memory), strict=True)]
    event_id, borders = tracked.event_id.copy(), list(tracked.borders)
    event_id[rows] = changed.event_id
    for row, kept in zip(rows.tolist(), changed.borders, strict=True):
        borders[row] = kept
    merged = UserState(
        Progress(**each(state.progress, new.progress)), Recent(**each(state.recent, new.recent)),
        unflatten(memory, state.memory),
    )  # fmt: skip
    return Tracked(merged, event_id, tuple(borders))
