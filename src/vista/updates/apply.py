"""New events for many users at once, applied to stored states, whatever order they arrive in.

The rule, the same as `vista prepare` has for a whole log (``vista.updates.order`` has it in code, docs/event-order.md
as a table): a history is in order of time, events of equal time in order of arrival; of events that repeat each other
the first in that order stays. After every call a state is what the whole, sorted log without repeats would give. How
far back a state is taken depends on the oldest new event of the user:

- at or after the newest closed border: the open segment, which is held raw, is sorted anew; no memory is touched;
- before that: from the newest kept border at or before it, events read from those held raw where they reach back that
  far, else from the replay source; from the start of the history where no border is kept.

What is known of repeats has the size of the state: the R newest events, held raw with their event ids. A copy of an
older one is late itself, unless its id comes with a newer time; the replay source knows. So: with a replay source the
result equals batch in every case; without one, an event too late for the held events is refused, and an event id that
comes again with a newer time after R other events is taken for a new event.

A time ahead of the clock by more than a tolerance is refused, not clamped: a clamped time would be in no log, and batch
and stream would differ for ever. The caller has the event back (`Update.outcome`) and may deliver it again later.

Not part of the rule: what ``vista prepare`` leaves out by size (bursts, short and overlong histories).

Shape letters: B users, R recent events, N events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vista.catalogue import id_array
from vista.checkpoint import Run
from vista.errors import ConfigError, DataError, Superseded
from vista.models.borders import Border, Spacing
from vista.models.vista import SequenceModel
from vista.store.contract import SummaryStore
from vista.store.record import user_key
from vista.updates.order import Arrivals, hash_event_ids, moves, order_of, repeats
from vista.updates.refold import Tracked, refold, start_border, take_users
from vista.updates.source import ReplaySource
from vista.updates.stored import Changed, load_states, writes_of

MOST_TRIES = 20  # at a commit that other processes were faster with each time
USERS_AT_ONCE = 256  # in one commit; with kept borders a user of a million events has some 300 kilobytes
AHEAD_US = 300 * 1_000_000  # clocks of servers agree within seconds, those of phones within minutes
EARLIEST_US = 631_152_000 * 1_000_000  # 1990, as in `vista prepare`: an older time is a wrong unit or column

# What became of an event. The first three are part of the history now; the last was delivered before.
APPLIED, SORTED_IN, REPLAYED, DUPLICATE, TOO_LATE, BAD_CLOCK, DELIVERED_BEFORE = range(7)
OUTCOMES = ("applied", "sorted in", "replayed", "duplicate", "too late", "bad clock", "delivered before")


@dataclass(frozen=True)
class NewEvents:
    """N events in order of arrival, as the outside world has them.

    action: original values, or None where the log has none; timestamp_us: (N,) int64 since 1970 UTC; event_id: integers
    or strings, None for an event without one, or None where the log has none at all. Raises DataError where lengths
    differ or timestamps are not integers.
    """

    user_id: Sequence[Any]
    item_id: Sequence[Any]
    timestamp_us: np.ndarray
    action: Sequence[Any] | None = None
    event_id: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("item_id", "timestamp_us", "action", "event_id"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.user_id):
                raise DataError(
                    f"new events: {len(values)} of {name} for {len(self.user_id)} of user_id; give one each"
                )
        if len(self.user_id) and np.asarray(self.timestamp_us).dtype.kind not in "iu":
            raise DataError(
                f"new events: timestamp_us is {np.asarray(self.timestamp_us).dtype}; give integers, in microseconds"
            )


@dataclass(frozen=True)
class Clock:
    """Which times are believed. now_us: None for this machine's clock; ahead_us: how far ahead of it is still now."""

    now_us: int | None = None
    ahead_us: int = AHEAD_US
    earliest_us: int = EARLIEST_US

    def believes(self, timestamp_us: np.ndarray, arrived_us: np.ndarray | None = None) -> np.ndarray:
        """(N,) bool. arrived_us (N,): what the clock said when each arrived, -1 where that is not known."""
        now_us = np.array(time.time_ns() // 1000 if self.now_us is None else self.now_us)
        if arrived_us is not None:
            now_us = np.where(arrived_us >= 0, arrived_us, now_us)
        return (timestamp_us >= self.earliest_us) & (timestamp_us <= now_us + self.ahead_us)


@dataclass(frozen=True)
class UpdateOptions:
    """source: where a replay reads, None for none; spacing: which borders are kept, None for none; codec: of tokens;
    alone: fold every segment by itself, so that states do not depend, to the last bit, on what is applied together."""

    source: ReplaySource | None = None
    spacing: Spacing | None = None
    clock: Clock = field(default_factory=Clock)
    codec: str = "int8"
    alone: bool = False


@dataclass(frozen=True)
class Update:
    """What a call did: outcome (N,) int8, an index into OUTCOMES, in order of arrival; users whose state changed; users
    taken back beyond the open segment, and how many events were read again for them."""

    outcome: np.ndarray
    num_changed: int = 0
    num_replays: int = 0
    num_replayed_events: int = 0

    def counts(self) -> dict[str, int]:
        """Events by outcome, in words."""
        return {name: int((self.outcome == code).sum()) for code, name in enumerate(OUTCOMES)}


def apply_events(run: Run, store: SummaryStore, events: NewEvents, options: UpdateOptions | None = None) -> Update:
    """Apply new events to the states in ``store``, and store the new states and tokens, some hundred users at a time.

    A block of users is committed at once. Interrupted in between, or delivered twice, the same events may be given
    again: those that are in are duplicates then (but one without id in a log with ids counts as often as it is given).
    Several processes may do so at once.

    Raises CheckpointError for a model that reads no events, ConfigError for scope "full", whose state is the whole
    history, DataError for ids that are none, StoreError where the store fails or has no such model version, RecordError
    for a damaged record.
    """
    options = options or UpdateOptions()
    model = check_model(run)
    arrivals, user_ids = encode_events(run, events)
    outcome = np.full(len(arrivals), BAD_CLOCK, np.int8)
    rows = np.flatnonzero(options.clock.believes(arrivals.timestamp_us))
    totals = np.zeros(3, np.int64)
    for first in range(0, len(user_ids), USERS_AT_ONCE):
        ids = user_ids[first : first + USERS_AT_ONCE]
        mine = rows[(arrivals.user[rows] >= first) & (arrivals.user[rows] < first + len(ids))]
        events_of_block = arrivals.take(mine)
        events_of_block.user[:] -= first
        if options.source is not None:
            options.source.record(ids, events_of_block)
        update = _apply_block(run, model, store, events_of_block, ids, options)
        outcome[mine] = update.outcome
        totals += (update.num_changed, update.num_replays, update.num_replayed_events)
    return Update(outcome, *totals.tolist())


def _apply_block(
    run: Run, model: SequenceModel, store: SummaryStore, events: Arrivals, ids: Sequence[Any], options: UpdateOptions
) -> Update:
    """Apply events to the states of some users, ``events.user`` being places in ``ids``, in one commit.

    It is done provided that the states are still as they were read, and anew where another process was faster.
    """
    for tries_left in reversed(range(MOST_TRIES)):
        loaded = load_states(model, store, ids, run.version)
        done, update = update_states(model, loaded.tracked, events, ids, options)
        writes = writes_of(run, loaded, done, ids, options.codec, alone=options.alone)
        try:
            if writes:
                store.commit(writes, run.version, [loaded.provided[user] for user in done.users.tolist()])
            return update
        except Superseded:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def check_model(run: Run) -> SequenceModel:
    """The model of a run, if it has states. Raises CheckpointError or ConfigError where it has none."""
    model = run.sequence_model
    if model.config.scope == "full":
        raise ConfigError("scope 'full' has no state to update, it reads the whole history each time: summarize again")
    return model


def encode_events(run: Run, events: NewEvents) -> tuple[Arrivals, list[Any]]:
    """Events with item and action indices, and the users they are of, each once, in order of appearance."""
    place: dict[bytes, int] = {}
    user_ids: list[Any] = []
    user = np.zeros(len(events.user_id), np.int64)
    for row, user_id in enumerate(id_array(list(events.user_id), mixed=True).tolist()):
        user[row] = place.setdefault(user_key(user_id), len(place))
        if len(place) > len(user_ids):
            user_ids.append(user_id)
    item = run.catalogue.encode(id_array(list(events.item_id), mixed=True)).astype(np.int64)
    action = run.schema.action_index(list(events.action)) if events.action is not None else [0] * len(user)
    event_id = hash_event_ids(events.event_id, len(user))
    times = np.asarray(events.timestamp_us, np.int64)
    return Arrivals(user, item, np.array(action, np.int64), times, event_id), user_ids


def update_states(
    model: SequenceModel, tracked: Tracked, events: Arrivals, user_ids: Sequence[Any], options: UpdateOptions
) -> tuple[Changed, Update]:
    """The changed states of B users after some events; ``events.user`` are their rows. See the head of this module."""
    step = _Step.of(model, tracked, events, user_ids, options.source)
    step.drop_duplicates()
    step.place_late_events()
    users = np.unique(events.user[step.is_in])
    chosen = [step.bases[user] for user in users.tolist()]
    tail = step.tail()
    place = np.full(len(user_ids), -1)
    place[users] = np.arange(len(users))
    tail = replace(tail, user=place[tail.user]).take(place[tail.user] >= 0)
    done = refold(model, take_users(tracked, users), chosen, tail, options.spacing, options.alone)
    is_replay = np.array([base is not None for base in chosen], bool)
    num_read_again = int(is_replay[tail.user].sum())
    return Changed(users, done), Update(step.outcome, len(users), int(is_replay.sum()), num_read_again)


@dataclass
class _Step:
    """One update under way.

    held, held_place: the events held raw and their places in the histories; num_closed, closed_us (B,): the newest
    closed borders; bases: where each user is taken back to, None for its newest closed border; source_tails: what the
    replay source has after that, where it was asked; is_in (N,): events that have not been turned down.
    """

    tracked: Tracked
    events: Arrivals
    user_ids: Sequence[Any]
    source: ReplaySource | None
    start: Border
    held: Arrivals
    held_place: np.ndarray
    num_closed: np.ndarray
    closed_us: np.ndarray
    bases: list[Border | None]
    source_tails: dict[int, Arrivals]
    outcome: np.ndarray
    is_in: np.ndarray

    @classmethod
    def of(
        cls, model: SequenceModel, tracked: Tracked, events: Arrivals, user_ids: Sequence[Any],
        source: ReplaySource | None,
    ) -> _Step:  # fmt: skip
        newest_us = tracked.state.progress.last_us.numpy()[events.user]
        return cls(
            tracked, events, user_ids, source, start_border(model), *tracked.held(),
            *tracked.closed(model.config.segment_events), [None] * len(user_ids), {},
            np.where(events.timestamp_us >= newest_us, APPLIED, SORTED_IN).astype(np.int8),
            np.ones(len(events), bool),
        )  # fmt: skip

    def turn_down(self, rows: np.ndarray, outcome: int) -> None:
        """rows: indices or a mask."""
        self.outcome[rows] = outcome
        self.is_in[rows] = False

    def drop_duplicates(self) -> None:
        """Turn down what repeats an event held or arriving, or one the source knows with an older time."""
        line = Arrivals.join([self.held, self.events])
        self.turn_down(_repeats_in_order(line)[len(self.held) :], DUPLICATE)
        if self.source is not None:
            rows = np.flatnonzero(self.is_in & (self.events.event_id > 0))
            ids = [self.user_ids[user] for user in self.events.user[rows].tolist()]
            earliest_us = self.source.earliest_us(ids, self.events.event_id[rows])
            self.turn_down(rows[earliest_us < self.events.timestamp_us[rows]], DUPLICATE)

    def place_late_events(self) -> None:
        """Choose a base for every user with events before the newest closed border, or turn those events down."""
        closed_us = self.closed_us[self.events.user]
        late = self.is_in & (self.events.timestamp_us < closed_us)
        asks = np.zeros(len(late), bool)
        if self.source is not None:
            # A repeat of an event may have been let go while others of its time are held. And a user without a state
            # may still have a history.
            asks = self.is_in & (self.events.timestamp_us <= self._let_go_us()[self.events.user])
            asks |= self.is_in & (self.tracked.num_events == 0)[self.events.user]
        for user in np.unique(self.events.user[late | asks]).tolist():
            mine = self.events.user == user
            self._place(user, np.flatnonzero((late | asks) & mine), bool((asks & mine).any()))

    def _let_go_us(self) -> np.ndarray:
        """The latest time of which an event may exist that is no longer held, (B,) int64; -1 where all are held."""
        num_held, size = self.tracked.num_held, self.tracked.event_id.shape[1]
        oldest = np.minimum(size - num_held, size - 1)
        oldest_us = np.take_along_axis(self.tracked.state.recent.timestamp_us.numpy(), oldest[:, None], 1)[:, 0]
        return np.where(self.tracked.num_events > num_held, oldest_us, -1)

    def _place(self, user: int, late: np.ndarray, asks_source: bool = False) -> None:
        """late: rows of one user's late events; asks_source: what is held does not tell all there is to know."""
        first_held = int(self.tracked.num_events[user] - self.tracked.num_held[user])
        oldest_us = int(self.events.timestamp_us[late].min())
        kept = self.tracked.borders[user]
        base = kept.before(oldest_us) or self.start
        if base.num_events >= first_held and not asks_source:
            self._replay(user, late, base)
        elif self.source is not None:
            self._place_from_source(user, late, base)
        else:
            reachable = [b for b in (self.start, *kept.borders) if b.num_events >= first_held]
            from_us = reachable[0].last_us if reachable else np.inf
            is_lost = self.events.timestamp_us[late] < from_us
            self.turn_down(late[is_lost], TOO_LATE)
            if not is_lost.all():
                self._place(user, late[~is_lost])

    def _replay(self, user: int, late: np.ndarray, base: Border) -> None:
        self.outcome[late] = REPLAYED
        self.bases[user] = base

    def _place_from_source(self, user: int, late: np.ndarray, base: Border) -> None:
        num_before, num_held = int(self.tracked.num_events[user]), int(self.tracked.num_held[user])
        num_others = int((self.is_in & (self.events.user == user)).sum()) - len(late)
        tail, has_moved = self._read_source(user, base)
        is_as_before = base.num_events + len(tail) == num_before + num_others and not has_moved
        if num_before and is_as_before:  # the late ones repeat events that are no longer held
            self.turn_down(late, DUPLICATE)
            return
        if not num_before and len(tail) == len(late):  # a new user: nothing to read again
            return
        size = self.tracked.event_id.shape[1]
        while base.num_events:
            num_after, num_kept = base.num_events + len(tail), max(num_held - (num_before - base.num_events), 0)
            if min(size, num_after) <= num_kept + len(tail):
                break
            base = self.tracked.borders[user].before(base.last_us, below_events=base.num_events) or self.start
            tail, _ = self._read_source(user, base)
        self._replay(user, late, base)
        self.source_tails[user] = tail

    def _read_source(self, user: int, base: Border) -> tuple[Arrivals, bool]:
        """A user's events after a border, in order and without repeats; and whether one was met with two times."""
        assert self.source is not None
        found = self.source.events(self.user_ids[user], base.last_us)
        found = found.take(order_of(found))
        has_moved = bool(moves(found).any())
        found = found.take(~repeats(found))
        if base.num_events:
            with_id = np.flatnonzero(found.event_id > 0)
            earliest_us = self.source.earliest_us([self.user_ids[user]] * len(with_id), found.event_id[with_id])
            found = found.take(np.setdiff1d(np.arange(len(found)), with_id[earliest_us < base.last_us]))
        ties = found.timestamp_us[: base.num_ties]
        if len(ties) < base.num_ties or (ties != base.last_us).any():
            raise DataError(
                f"user {self.user_ids[user]}: the replay source has {int((ties == base.last_us).sum())} events at "
                f"{_utc(base.last_us)}, the stored state {base.num_ties}; it is not the log the state was made from: "
                "summarize the user again"
            )
        rest = found.take(np.arange(base.num_ties, len(found)))
        return replace(rest, user=np.full(len(rest), user)), has_moved

    def tail(self) -> Arrivals:
        """What each user reads after its base, by user and in order."""
        base_events = self.num_closed.copy()
        for user, base in enumerate(self.bases):
            if base is not None:
                base_events[user] = base.num_events
        new = self.events.take(self.is_in)
        line = Arrivals.join([self.held, new])
        is_after = np.append(self.held_place >= base_events[self.held.user], np.ones(len(new), bool))
        is_after &= ~_repeats_in_order(line) & ~np.isin(line.user, list(self.source_tails))
        line = line.take(is_after)
        line = Arrivals.join([line.take(order_of(line)), *self.source_tails.values()])
        return line.take(np.argsort(line.user, kind="stable"))


def _repeats_in_order(line: Arrivals) -> np.ndarray:
    """Which events repeat one that is earlier in order, (N,) bool; events of equal time as they stand."""
    order = order_of(line)
    repeated = np.empty(len(line), bool)
    repeated[order] = repeats(line.take(order))
    return repeated


def _utc(timestamp_us: int) -> str:
    return datetime.fromtimestamp(timestamp_us / 1e6, UTC).isoformat()
