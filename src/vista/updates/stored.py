"""States out of a store and back into it, with what putting events in order needs: event ids, borders, marks.

A *mark* is what makes a log's events count once: per partition of a log, the offset below which all of the user's
events are in. It is an array of the state record, so no engine can store the one without the other.

Shape letters: B users, C users whose state changed, R recent events.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vista.checkpoint import Run
from vista.models.vista import SequenceModel
from vista.records import (
    borders_from_record,
    borders_to_record,
    from_records,
    one_user,
    recent_arrays,
    state_records,
    tokens_records,
)
from vista.store.contract import Provided, SummaryStore, Write
from vista.store.record import Record, decode, encode, repack, unpack, user_key
from vista.updates.order import UNKNOWN_ID
from vista.updates.refold import Tracked

Marks = dict[int, int]  # of one user: partition of a log (`vista.jobs.deliver.partition_key`) to offset
MARK_ARRAYS = ("log_partition", "log_offset")


@dataclass(frozen=True)
class Loaded:
    """B states from a store; border_crc (B,) int64: the checksum of each border record, -1 where none is in use;
    provided: the state records they were read from."""

    tracked: Tracked
    border_crc: np.ndarray
    marks: list[Marks]
    provided: list[Provided]


@dataclass(frozen=True)
class Changed:
    """States that an update has changed: users, their rows among those it was given, (C,) int64; tracked, C of them."""

    users: np.ndarray
    tracked: Tracked


def load_states(model: SequenceModel, store: SummaryStore, user_ids: Sequence[Any], version: str) -> Loaded:
    """The stored states of some users; those the store does not know have no events.

    A border record is used only if the state record names it: a state that was written without regard to kept borders
    (a bulk run, a removal) has none.
    """
    keys = [user_key(user_id) for user_id in user_ids]
    blobs = store.get_many("state", keys, version)
    records = [None if blob is None else decode(blob, version) for blob in blobs]
    tracked = Tracked.of(from_records(model, records))
    border_crc = np.full(len(keys), -1)
    borders = list(tracked.borders)
    marks: list[Marks] = [{} for _ in keys]
    for user, (record, blob) in enumerate(zip(records, store.get_many("border", keys, version), strict=True)):
        if record is None:
            continue
        event_id = record.arrays.get("recent_event_id", np.zeros(0, np.int64))
        tracked.event_id[user, tracked.event_id.shape[1] - len(event_id) :] = event_id
        if MARK_ARRAYS[0] in record.arrays:
            marks[user] = dict(zip(*(record.arrays[name].tolist() for name in MARK_ARRAYS), strict=True))
        if blob is not None and record.arrays.get("border_crc", [-1])[0] == zlib.crc32(blob):
            border_crc[user], borders[user] = zlib.crc32(blob), borders_from_record(decode(blob, version))
    provided = [("state", key, blob) for key, blob in zip(keys, blobs, strict=True)]
    return Loaded(replace(tracked, borders=tuple(borders)), border_crc, marks, provided)


def writes_of(
    run: Run, loaded: Loaded, done: Changed, user_ids: Sequence[Any], codec: str, alone: bool = False
) -> list[Write]:
    """What is to be stored after an update: per changed user tokens and state, and the borders where they changed."""
    ids = [user_ids[user] for user in done.users.tolist()]
    tokens = tokens_records(run.sequence_model, done.tracked.state, ids, run.version, alone)
    return [*state_writes(run, loaded, done, user_ids, codec), *(write_of(record, codec) for record in tokens)]


def write_of(record: Record, codec: str) -> Write:
    return record.kind, record.user_key, encode(record, codec)


def state_writes(run: Run, loaded: Loaded, done: Changed, user_ids: Sequence[Any], codec: str) -> list[Write]:
    """Per changed user the state, and the borders where they changed."""
    ids = [user_ids[user] for user in done.users.tolist()]
    writes: list[Write] = []
    states = state_records(run.sequence_model, done.tracked.state, ids, run.version)
    for row, (user, state) in enumerate(zip(done.users.tolist(), states, strict=True)):
        crc = int(loaded.border_crc[user])
        kept = done.tracked.borders[row]
        if not kept.is_same(loaded.tracked.borders[user]):
            kind, key, blob = write_of(borders_to_record(kept, user_ids[user], run.version), codec)
            crc = zlib.crc32(blob)
            writes.append((kind, key, blob))
        num_held = int(done.tracked.num_held[row])
        event_id = done.tracked.event_id[row, done.tracked.event_id.shape[1] - num_held :]
        extra = {"border_crc": np.array([crc])} if crc >= 0 else {}
        if (event_id != UNKNOWN_ID).any():
            extra["recent_event_id"] = event_id
        if loaded.marks[user]:
            columns = zip(*sorted(loaded.marks[user].items()), strict=True)
            extra |= {name: np.array(column, np.int64) for name, column in zip(MARK_ARRAYS, columns, strict=True)}
        writes.append(write_of(replace(state, arrays=state.arrays | extra), codec))
    return writes


def tokens_writes(
    run: Run, store: SummaryStore, done: Changed, user_ids: Sequence[Any], is_new: np.ndarray, codec: str
) -> list[Write]:
    """The tokens of changed users, each read by itself, as far as they differ from what is stored.

    Tokens are as of the newest closed border: until it moves, only the recent events of a record change. is_new (C,)
    bool: the memory was changed before the newest border, too.
    """
    ids = [user_ids[user] for user in done.users.tolist()]
    blobs = store.get_many("tokens", [user_key(user_id) for user_id in ids], run.version)
    size, newest = run.config.model.segment_events, run.config.model.recent_events
    state = done.tracked.state
    num_events, last_us = (column.tolist() for column in (state.progress.num_events, state.progress.last_us))
    writes: list[Write] = []
    for row, (user_id, blob, recent) in enumerate(zip(ids, blobs, recent_arrays(state), strict=True)):
        stored = None if blob is None or is_new[row] else unpack(blob, run.version)
        is_border_same = stored is not None and stored.num_events // size == num_events[row] // size
        if stored is not None and is_border_same and stored.codec == codec:
            hot = {name: array[-newest:] for name, array in recent.items()}
            others = {name: array for name, array in stored.arrays.items() if name not in hot}
            changed = stored._replace(as_of_us=last_us[row], num_events=num_events[row], arrays=hot | others)
            writes.append(("tokens", user_key(user_id), repack(changed)))
        else:
            (record,) = tokens_records(run.sequence_model, one_user(state, row), [user_id], run.version)
            writes.append(write_of(record, codec))
    return writes
