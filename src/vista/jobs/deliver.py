"""Events of a log with offsets, in the states of a store exactly once each, and to the same last bit however delivered.

Every state carries *marks* (`vista.updates.stored`): the offset of a log's partition below which all of the user's
events are in. An event below its user's mark was delivered before and is passed over, whether it has an event id or
not. State and mark are one record, so that no engine can lose one of them alone.

The offset is also the identity of an event without an event id: two of them are two events, as equal as they may be.

What becomes of an event does not depend on what is delivered together with it:

- it is judged as if it came alone. Where that could make a difference (an event out of order, or one that may repeat
  another), a user's events are applied in several *rounds*, and such an event begins one;
- clocks are compared at the moment of arrival, which the log knows, not at that of the delivery;
- every segment is folded, and every user's tokens are read, by themselves (`UpdateOptions.alone`).

Shape letters: N events, B users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vista.checkpoint import Run
from vista.store.contract import Provided, SummaryStore, Write
from vista.updates.apply import (
    APPLIED,
    BAD_CLOCK,
    DELIVERED_BEFORE,
    REPLAYED,
    SORTED_IN,
    USERS_AT_ONCE,
    NewEvents,
    UpdateOptions,
    check_model,
    encode_events,
    update_states,
)
from vista.updates.order import Arrivals, repeats
from vista.updates.refold import Tracked, put_users, take_users
from vista.updates.stored import Changed, Loaded, load_states, state_writes, tokens_writes

IN_STATE = (APPLIED, SORTED_IN, REPLAYED, DELIVERED_BEFORE)  # what has become of an event that a state holds


@dataclass(frozen=True)
class Delivery:
    """N events of a log; those of one partition in order of their offsets.

    log: the log's name; partition, offset (N,) int64; arrived_us (N,) int64: when the log got each, -1 where it does
    not know.
    """

    events: NewEvents
    log: str
    partition: np.ndarray
    offset: np.ndarray
    arrived_us: np.ndarray


@dataclass(frozen=True)
class Block:
    """What of a delivery is stored in one commit: the events of B users.

    rows (n,) int64: their places in the delivery; arrivals: the same n events, ``user`` a place in user_ids; mark (n,)
    int64: the key of each one's partition.
    """

    rows: np.ndarray
    user_ids: list[Any]
    arrivals: Arrivals
    mark: np.ndarray
    offset: np.ndarray
    arrived_us: np.ndarray

    def by_user(self) -> Iterator[Block]:
        """One block for each user."""
        for user, user_id in enumerate(self.user_ids):
            mine = np.flatnonzero(self.arrivals.user == user)
            arrivals = replace(self.arrivals.take(mine), user=np.zeros(len(mine), np.int64))
            yield Block(self.rows[mine], [user_id], arrivals, self.mark[mine], self.offset[mine], self.arrived_us[mine])


@dataclass(frozen=True)
class Work:
    """What is to be stored of a block: outcome (n,) int8, an index into OUTCOMES; writes for one commit, and the states
    they follow from, as they were read; has_tokens (B,) bool: whose tokens are among the writes."""

    outcome: np.ndarray
    writes: list[Write]
    provided: list[Provided]
    has_tokens: np.ndarray


def partition_key(log: str, partition: int) -> int:
    """What stands for a partition of a log in a state: a hash, for a name can have any length."""
    digest = hashlib.blake2b(f"{log}\0{partition}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def blocks(run: Run, delivery: Delivery) -> Iterator[Block]:
    """A delivery by blocks of users. Raises DataError for ids that are none."""
    check_model(run)
    arrivals, user_ids = encode_events(run, delivery.events)
    keys = {number: partition_key(delivery.log, number) for number in np.unique(delivery.partition).tolist()}
    mark = np.array([keys[number] for number in delivery.partition.tolist()], np.int64)
    for first in range(0, len(user_ids), USERS_AT_ONCE):
        ids = user_ids[first : first + USERS_AT_ONCE]
        rows = np.flatnonzero((arrivals.user >= first) & (arrivals.user < first + len(ids)))
        mine = arrivals.take(rows)
        mine = replace(mine, user=mine.user - first)
        yield Block(rows, ids, mine, mark[rows], delivery.offset[rows], delivery.arrived_us[rows])


def work_out(run: Run, store: SummaryStore, block: Block, options: UpdateOptions, is_due: np.ndarray) -> Work:
    """Apply a block's events to the stored states; nothing is stored yet.

    is_due (B,) bool: users whose tokens are to be written if the state changes; those of a user whose memory was taken
    back are written in any case, so that stored tokens of a border are never older than that border. Raises
    RecordError for a damaged record, StoreError where the store fails.
    """
    options = replace(options, alone=True)
    loaded = load_states(run.sequence_model, store, block.user_ids, run.version)
    outcome = np.full(len(block.rows), BAD_CLOCK, np.int8)
    is_new = _above_marks(block, loaded)
    outcome[~is_new] = DELIVERED_BEFORE
    rows = np.flatnonzero(is_new & options.clock.believes(block.arrivals.timestamp_us, block.arrived_us))
    events = block.arrivals.take(rows)
    rounds = rounds_of(loaded.tracked, events)
    tracked = loaded.tracked
    is_changed = np.zeros(len(block.user_ids), bool)
    for number in np.unique(rounds).tolist():
        mine = np.flatnonzero(rounds == number)
        done, outcome[rows[mine]] = _apply_round(run, tracked, events.take(mine), block.user_ids, options)
        tracked = put_users(tracked, done.users, done.tracked)
        is_changed[done.users] = True
    _raise_marks(block, loaded, np.isin(outcome, IN_STATE))
    users = np.flatnonzero(is_changed)
    done = Changed(users, take_users(tracked, users))
    was_taken_back = np.zeros(len(block.user_ids), bool)
    was_taken_back[block.arrivals.user[outcome == REPLAYED]] = True
    writes = state_writes(run, loaded, done, block.user_ids, options.codec)
    has_tokens = is_changed & (is_due | was_taken_back)
    with_tokens = np.flatnonzero(has_tokens)
    chosen = Changed(with_tokens, take_users(tracked, with_tokens))
    writes += tokens_writes(run, store, chosen, block.user_ids, was_taken_back[with_tokens], options.codec)
    return Work(outcome, writes, [loaded.provided[user] for user in users.tolist()], has_tokens)


def refresh(run: Run, store: SummaryStore, user_ids: Sequence[Any], codec: str) -> tuple[list[Write], list[Provided]]:
    """The tokens of some users as of their stored states, and these; nothing for one without a state.

    Raises as ``work_out``.
    """
    loaded = load_states(run.sequence_model, store, user_ids, run.version)
    users = np.flatnonzero(loaded.tracked.num_events > 0)
    done = Changed(users, take_users(loaded.tracked, users))
    writes = tokens_writes(run, store, done, user_ids, np.zeros(len(users), bool), codec)
    return writes, [loaded.provided[user] for user in users.tolist()]


def _above_marks(block: Block, loaded: Loaded) -> np.ndarray:
    """Which events are not in their users' states, (n,) bool."""
    pairs = zip(block.arrivals.user.tolist(), block.mark.tolist(), strict=True)
    marks = [loaded.marks[user].get(key, -1) for user, key in pairs]
    return block.offset >= np.array(marks, np.int64)


def _raise_marks(block: Block, loaded: Loaded, is_in: np.ndarray) -> None:
    """Above every event that went into a state. One turned down behind the last of them changes no state, whatever it
    was delivered with; delivered again it meets the same state, and is turned down again."""
    taken = (column[is_in].tolist() for column in (block.arrivals.user, block.mark, block.offset))
    for user, key, offset in zip(*taken, strict=True):
        loaded.marks[user][key] = max(offset + 1, loaded.marks[user].get(key, 0))


def rounds_of(tracked: Tracked, events: Arrivals) -> np.ndarray:
    """The round in which each event is applied, (n,) int64: those of a user never fall.

    A round begins with an event that is older than one before it, or may repeat one held or delivered before it; all
    others of the round are new and in order, so that applying them together is applying them one by one.
    """
    if not len(events):
        return np.zeros(0, np.int64)
    held, _ = tracked.held()
    line = Arrivals.join([held, events])
    order = np.argsort(line.user, kind="stable")
    sorted_line = line.take(order)
    begins = np.empty(len(line), bool)
    begins[order] = repeats(sorted_line) | _is_out_of_order(sorted_line)
    begins = begins[len(held) :]
    order = np.argsort(events.user, kind="stable")
    count = np.cumsum(begins[order])
    starts = np.searchsorted(events.user[order], events.user[order])  # of each row's user
    rounds = np.empty(len(events), np.int64)
    rounds[order] = count - (count - begins[order])[starts]
    return rounds


def _is_out_of_order(line: Arrivals) -> np.ndarray:
    """Which events are older than one of the same user in front of them, (n,) bool; events by user."""
    times = line.timestamp_us - line.timestamp_us.min()
    rank = np.unique(line.user, return_inverse=True)[1]
    lifted = times + rank * (int(times.max()) + 1)  # every user above the ones before: one running maximum serves all
    return lifted < np.maximum.accumulate(lifted)


def _apply_round(
    run: Run, tracked: Tracked, events: Arrivals, user_ids: Sequence[Any], options: UpdateOptions
) -> tuple[Changed, np.ndarray]:
    """The states that a round changes, ``users`` being rows of ``tracked``, and what became of its events."""
    users, user = np.unique(events.user, return_inverse=True)
    ids = [user_ids[row] for row in users.tolist()]
    events = replace(events, user=user.astype(np.int64))
    if options.source is not None:
        options.source.record(ids, events)
    done, update = update_states(run.sequence_model, take_users(tracked, users), events, ids, options)
    return Changed(users[done.users], done.tracked), update.outcome
