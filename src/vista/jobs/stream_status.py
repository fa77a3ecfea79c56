"""Where streams are, seen from beside: from the offsets in a store and the ends of a log; nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass

from vista.jobs.positions import load_positions
from vista.jobs.sources.contract import EventSource
from vista.jobs.stream import lag
from vista.store.contract import SummaryStore


@dataclass(frozen=True)
class PartitionStatus:
    """One partition for one model version.

    offset: all entries below are in the states; start_offset: and all below this one in the tokens, too; end: of the
    log; num_behind, behind_s: entries from the offset on, and the age of the first; updated_us: when the stream last
    stored its offset; counts: entries by what became of them.
    """

    version: str
    partition: int
    offset: int
    start_offset: int
    end: int
    num_behind: int
    behind_s: float
    updated_us: int
    counts: dict[str, int]


def stream_status(store: SummaryStore, source: EventSource, log: str | None = None) -> list[PartitionStatus]:
    """One row per model version and partition that was ever streamed. Raises StoreError or SourceError."""
    rows, ends = [], source.ends()
    for info in store.versions():
        found = load_positions(store, info.version, log or source.name, list(ends))
        positions = {number: position for number, position in found.items() if position.updated_us >= 0}
        num_behind, behind_s = lag(source, positions)
        rows += [
            PartitionStatus(
                info.version, n, p.next_offset, p.start_offset, ends[n], num_behind[n], behind_s[n], p.updated_us,
                p.by_outcome(),
            )
            for n, p in positions.items()
        ]  # fmt: skip
    return rows
