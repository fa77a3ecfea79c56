"""Bulk: every user's history to a summary record in a store.

Resumable and idempotent: a user whose stored record already holds all of their events is passed over. Users go in
blocks; tokens and state of a block are committed together, so that an interruption loses at most the block under way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vista.batches.timelines import ragged_arange
from vista.checkpoint import Run
from vista.data.histories import Histories, PreparedData
from vista.errors import VistaWarning
from vista.models.inputs import Events
from vista.models.vista import SequenceModel
from vista.progress import Progress
from vista.records import to_records
from vista.store.contract import SummaryStore
from vista.store.record import Record, decode, encode, user_key

USERS_AT_ONCE = 256  # states of one block; a record of 64 x 64 tokens and its state are some 40 kilobytes
EVENTS_AT_ONCE = 65_536  # events of a block read from the log and folded together: bounds memory at any history length


@dataclass(frozen=True)
class SummarizeReport:
    """What a bulk run did: users and events summarized, users passed over because their record was current."""

    num_users: int
    num_events: int
    num_current: int
    version: str


def summarize(
    run: Run,
    data: PreparedData,
    store: SummaryStore,
    codec: str = "int8",
    force: bool = False,
    quiet: bool = False,
    publish: bool = True,
) -> SummarizeReport:
    """Summarize every user of ``data`` into ``store``, then mark the version as complete and publish it.

    force: also users whose record is current. Raises CheckpointError for data the run was not trained on.
    """
    run.check_data(data.manifest, data.catalogue, data.folder)
    model, histories = run.sequence_model, data.histories
    config = run.config.model
    users = np.arange(histories.num_users)
    store.begin_version(run.version, num_tokens=config.num_seeds, width=config.width, expected_users=len(users))
    current = 0
    num_users = num_events = 0
    with Progress("summarize", total=int(histories.num_events), unit="events", quiet=quiet) as progress:
        for block in np.array_split(users, max(1, -(-len(users) // USERS_AT_ONCE))):
            wanted = block if force else _not_current(block, data, store, run.version)
            current += len(block) - len(wanted)
            lengths = histories.lengths()
            if len(wanted):
                if not num_users:
                    _restart_streams(store, run.version)
                records = summarize_users(model, histories, wanted, data.user_ids[wanted], run.version)
                store.commit([(r.kind, r.user_key, encode(r, codec)) for r in records], version=run.version)
                num_users += len(wanted)
                num_events += int(lengths[wanted].sum())
            progress.advance(int(lengths[block].sum()))
    store.complete_version(run.version)
    if publish:
        store.publish(run.version)
    return SummarizeReport(num_users, num_events, current, run.version)


def _restart_streams(store: SummaryStore, version: str) -> None:
    """Remove streams' positions: a state made anew has none of the events that a log has brought since."""
    keys = [key for key, _ in store.scan("position", version)]
    for key in keys:
        store.delete(key, version)
    if keys:
        warnings.warn(
            f"version {version} is streamed into: users summarized now lose the marks of it, so the stream must start "
            "again, at the beginning of its log; --since passes over what the data has",
            VistaWarning,
            stacklevel=3,
        )


def _not_current(block: np.ndarray, data: PreparedData, store: SummaryStore, version: str) -> np.ndarray:
    """The users of a block whose stored record is missing or does not hold all of their events."""
    lengths = data.histories.lengths()[block]
    blobs = store.get_many("tokens", [user_key(user) for user in data.user_ids[block].tolist()], version)
    stored = [-1 if blob is None else decode(blob, version).num_events for blob in blobs]
    return block[np.array(stored) != lengths]


@torch.no_grad()
def summarize_users(
    model: SequenceModel, histories: Histories, users: np.ndarray, user_ids: np.ndarray, version: str
) -> list[Record]:
    """Tokens and state records of some users, from the beginning of their histories."""
    if model.config.scope == "full" and len(users) > 1:  # the reference keeps one history at a time
        blocks = zip(users[:, None], user_ids[:, None], strict=True)
        return [r for one, one_id in blocks for r in summarize_users(model, histories, one, one_id, version)]
    state = model.init_state(len(users))
    for events in read_in_parts(histories, users, EVENTS_AT_ONCE):
        state = model.extend(state, events)
    return to_records(model, state, user_ids.tolist(), version)


def read_in_parts(histories: Histories, users: np.ndarray, max_events: int) -> Iterator[Events]:
    """The histories of some users in time order, at most about ``max_events`` events of all of them at a time."""
    starts = np.asarray(histories.offsets, np.int64)[users]
    left = np.asarray(histories.offsets, np.int64)[users + 1] - starts
    share = max(max_events // max(len(users), 1), 1)
    while left.any():
        lengths = np.minimum(left, share)
        index = ragged_arange(starts, lengths)
        columns = (histories.item, histories.action, histories.timestamp_us)
        item, action, timestamp_us = (torch.from_numpy(column[index].astype(np.int64)) for column in columns)
        yield Events.from_log(item, action, timestamp_us, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])))
        starts, left = starts + lengths, left - lengths
