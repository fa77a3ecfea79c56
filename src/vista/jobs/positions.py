"""Where a stream is in a log: one record per partition and model version, beside the states.

Which events are in a state is said by the state's own marks (`vista.updates.stored`). A position is only a lower bound:
all below it are in, so that reading starts there. It is written after the states, and is right whatever the engine can
put into one transaction; older than it could be, it costs a few events that are passed over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vista.store.contract import SummaryStore, Write
from vista.store.record import Record, decode, encode, user_key
from vista.updates.apply import OUTCOMES

MALFORMED, PASSED_OVER, DAMAGED = "malformed", "passed over", "damaged state"
COUNTED = (*OUTCOMES, MALFORMED, PASSED_OVER, DAMAGED)  # in this order in the record: new ones go to the end
OWNER_BYTES = 16


@dataclass
class Position:
    """One partition.

    next_offset: where reading goes on now; start_offset: where it would after a crash, at the first event whose user's
    tokens are still to be written; owner: of the process that streams it; counts: entries by what became of them
    (COUNTED); updated_us: when it was stored, -1 for never.
    """

    partition: int
    start_offset: int = 0
    next_offset: int = 0
    owner: bytes = bytes(OWNER_BYTES)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(COUNTED), np.int64))
    updated_us: int = -1

    def count(self, outcome: str, num: int = 1) -> None:
        self.counts[COUNTED.index(outcome)] += num

    def by_outcome(self) -> dict[str, int]:
        return dict(zip(COUNTED, self.counts.tolist(), strict=True))


def position_key(log: str, partition: int) -> bytes:
    return user_key(f"{partition} of {log}")


def load_positions(store: SummaryStore, version: str, log: str, partitions: Sequence[int]) -> dict[int, Position]:
    """Where a stream is in these partitions; at the beginning where it has never been. Raises StoreError."""
    blobs = store.get_many("position", [position_key(log, number) for number in partitions], version)
    found = {number: Position(number) for number in partitions}
    for number, blob in zip(partitions, blobs, strict=True):
        if blob is not None:
            arrays = decode(blob, version).arrays
            start, following, updated_us = arrays["offsets"].tolist()
            counts = np.zeros(len(COUNTED), np.int64)
            counts[: len(arrays["counts"])] = arrays["counts"]
            found[number] = Position(number, start, following, arrays["owner"].tobytes(), counts, updated_us)
    return found


def position_write(position: Position, version: str, log: str) -> Write:
    now_us = time.time_ns() // 1000
    arrays = {
        "offsets": np.array([position.start_offset, position.next_offset, now_us], np.int64),
        "counts": position.counts, "owner": np.frombuffer(position.owner, np.uint8),
    }  # fmt: skip
    key = position_key(log, position.partition)
    record = Record("position", version, key, now_us, int(position.counts.sum()), arrays)
    return record.kind, record.user_key, encode(record)


def owned(position: Position, owner: bytes) -> Position:
    """A position as a process takes it over: reading starts again where nothing is missing."""
    return replace(position, owner=owner, next_offset=position.start_offset)
