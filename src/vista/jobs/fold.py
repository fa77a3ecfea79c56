"""Histories to summary records: of some users at once, and of a block in which some may be broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.checkpoint import Run, load_run
from vista.data.histories import Histories, PreparedData
from vista.devices import device_of
from vista.errors import CheckpointError, VistaError
from vista.jobs.blocks import Block
from vista.models.inputs import Events, ragged_arange
from vista.models.vista import SequenceModel
from vista.records import to_records
from vista.schema import Manifest
from vista.store.contract import Write
from vista.store.record import Record, encode

EVENTS_READ_AT_ONCE = {"cpu": 65_536, "cuda": 262_144}  # of some users, from the log: bounds memory at any length
REASON_CHARACTERS = 300  # of an error that is reported; torch prints whole stacks


@dataclass(frozen=True)
class FailedUser:
    """A user without a new record, and why."""

    user_id: Any
    reason: str
    num_events: int


@dataclass(frozen=True)
class Folded:
    """What became of a block: the records of some of its users, ready to be committed, and the users that failed."""

    writes: list[Write] = field(default_factory=list)
    num_users: int = 0
    num_events: int = 0
    failed: tuple[FailedUser, ...] = ()


@dataclass(frozen=True)
class FoldTask:
    """What a process needs to fold blocks: small, the model and the histories are opened from their folders."""

    run_folder: Path
    version: str
    data_folder: Path
    manifest: Manifest
    codec: str

    @classmethod
    def of(cls, run: Run, data: PreparedData, codec: str) -> FoldTask:
        return cls(run.folder.resolve(), run.version, data.folder.resolve(), data.manifest, codec)

    def open(self) -> Fold:
        """The model loaded, the histories mapped into memory. Raises VistaError where either was changed meanwhile."""
        run = load_run(self.run_folder)
        if run.version != self.version:
            raise CheckpointError(f"{self.run_folder} was changed while it was being used; run the command again")
        return Fold(run, PreparedData(self.data_folder, self.manifest).histories, self.codec)


@dataclass(frozen=True)
class Fold:
    """Folds blocks of users. One per process: it holds the model."""

    run: Run
    histories: Histories
    codec: str

    def __call__(self, block: Block) -> Folded:
        """The block's records. A user whose history cannot be folded is told apart from the others, and fails alone."""
        reasons = [self._what_is_wrong(user) for user in block.users.tolist()]
        is_good = np.array([reason is None for reason in reasons])
        failed = [
            FailedUser(user_id, reason, length)
            for user_id, reason, length in zip(block.user_ids.tolist(), reasons, block.lengths.tolist(), strict=True)
            if reason is not None
        ]
        writes, num_users, num_events = self._fold_together(block.only(is_good), failed)
        return Folded(writes, num_users, num_events, tuple(failed))

    def _fold_together(self, block: Block, failed: list[FailedUser]) -> tuple[list[Write], int, int]:
        """Records, users and events of a block; where that fails, of its users one by one, and who fails then."""
        if not len(block.users):
            return [], 0, 0
        try:
            records = summarize_users(
                self.run.sequence_model, self.histories, block.users, block.user_ids, self.run.version
            )
            writes = [(r.kind, r.user_key, encode(r, self.codec)) for r in records]
            return writes, len(block.users), block.num_events
        except Exception as error:  # whatever it is, it must not take other users with it
            if len(block.users) == 1:
                failed.append(FailedUser(block.user_ids.tolist()[0], reason_of(error), block.num_events))
                return [], 0, 0
        parts = [self._fold_together(one, failed) for one in block.one_by_one()]
        return [write for part in parts for write in part[0]], sum(p[1] for p in parts), sum(p[2] for p in parts)

    def _what_is_wrong(self, user: int) -> str | None:
        """Why a history cannot be the user's, None where it can: an index too large would fail, others would not."""
        start, end = (int(offset) for offset in self.histories.offsets[user : user + 2])
        if not 0 <= start <= end <= self.histories.num_events:
            return f"its history is said to be events {start} to {end}; prepare the data again"
        item, action, timestamp_us = (
            np.asarray(column[start:end])
            for column in (self.histories.item, self.histories.action, self.histories.timestamp_us)
        )
        num_items, num_actions = self.run.catalogue.num_indices, len(self.run.schema.actions)
        checks = (
            ("item index", item, (item < 1) | (item >= num_items), f"it is between 1 and {num_items - 1}"),
            ("action", action, (action < 0) | (action > num_actions), f"it is between 0 and {num_actions}"),
            ("timestamp", timestamp_us, _goes_back(timestamp_us), "it is not before that of the event before"),
        )
        for name, column, is_bad, rule in checks:
            if is_bad.any():
                place = int(is_bad.argmax())
                return (
                    f"event {place + 1} of {end - start} has {name} {column[place]}, but {rule}; prepare the data again"
                )
        return None


def _goes_back(timestamp_us: np.ndarray) -> np.ndarray:
    """Where a history goes back in time, or before 1970, (N,) bool."""
    return np.diff(timestamp_us, prepend=0) < 0


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    text = str(error) if isinstance(error, VistaError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:REASON_CHARACTERS]


@torch.no_grad()
def summarize_users(
    model: SequenceModel, histories: Histories, users: np.ndarray, user_ids: np.ndarray, version: str
) -> list[Record]:
    """Tokens and state records of some users, from the beginning of their histories."""
    if model.config.scope == "full" and len(users) > 1:  # the reference keeps one history at a time
        blocks = zip(users[:, None], user_ids[:, None], strict=True)
        return [r for one, one_id in blocks for r in summarize_users(model, histories, one, one_id, version)]
    device = device_of(model)
    state = model.init_state(len(users))
    for events in read_in_parts(histories, users, EVENTS_READ_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]):
        state = model.extend(state, events.to(device))
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
