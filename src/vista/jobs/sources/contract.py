"""What an event log is to `vista stream`, whatever keeps it: partitions, and in each of them entries with offsets.

A log only grows at its end. Its entries have offsets that rise within a partition; the log gives them, and they never
change: an entry read again has the offset it had. All events of a user should be in one partition (`partition_of`).

The stream keeps its own offsets, beside the states. So a log needs no memory of its readers, may deliver again whatever
it likes, and `acknowledge` only tells it, for its own displays and its retention, what it will not be asked for again.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from vista.errors import SourceError
from vista.store.contract import shown
from vista.store.record import user_key

SCHEMES = ("dir:PATH", "redis://HOST[:PORT][/DB]?stream=NAME", "kafka://BROKER[,BROKER]/TOPIC")
POLL_S = 0.02  # between looks for new entries: a fiftieth of a second is soon enough for a state
LONGEST_VALUE = 1 << 16  # bytes of an entry; what is longer is no event, and may be given cut to one byte more


@dataclass(frozen=True)
class Entry:
    """One entry of a log. next_offset: where reading goes on after it; arrived_us: when the log got it, -1: unknown."""

    partition: int
    offset: int
    next_offset: int
    value: bytes
    arrived_us: int = -1


class EventSource(Protocol):
    """A log that is read; tests/contracts/source.py holds every one to it. All methods raise SourceError on failure.

    name: of the log, the same from whatever machine it is read; the stream's offsets are kept under it.
    """

    name: str

    def partitions(self) -> list[int]:
        """The partitions there are now, in order."""

    def start(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions, and no others, from these offsets on; 0 is the beginning. May be called again."""

    def read(self, max_entries: int, timeout_s: float) -> list[Entry]:
        """The next entries, in order within a partition; waits for one at most so long. Nothing if there is none."""

    def ends(self) -> dict[int, int]:
        """Behind the newest whole entry of every partition there is: a partition read up to there is read."""

    def num_behind(self, offsets: Mapping[int, int]) -> dict[int, int]:
        """How many entries there are from these offsets on, per partition."""

    def peek(self, partition: int, offset: int) -> Entry | None:
        """The first entry at or after an offset, None where there is none; reading goes on where it was."""

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        """Say that no entry below these offsets will be asked for again."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_source(url: str) -> EventSource:
    """Open a log by URL, see SCHEMES. Raises SourceError for any other scheme and for a log that cannot be opened."""
    match url.partition(":")[0]:
        case "dir":
            from vista.jobs.sources.directory import DirectorySource

            return DirectorySource(url.removeprefix("dir:"))
        case "redis" | "rediss" | "unix":
            from vista.jobs.sources.redis_streams import RedisSource

            return RedisSource(url)
        case "kafka":
            from vista.jobs.sources.kafka import KafkaSource

            return KafkaSource(url)
        case _:
            raise SourceError(f"source {shown(url)!r}: not the URL of an event log; use {', '.join(SCHEMES)}")


def partition_of(user_id: Any, num_partitions: int) -> int:
    """The partition of a user's events: by the user's key, so that 7 and "7" go to the same."""
    return zlib.crc32(user_key(user_id)) % num_partitions


class PolledSource:
    """The reading side of a log that has to be looked at again and again: subclasses say what is there (``_entries``).

    No partition starves: each gets a share of every read, and another one comes first the next time.
    """

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def read(self, max_entries: int, timeout_s: float) -> list[Entry]:
        """As ``EventSource`` has it."""
        end_s = time.monotonic() + timeout_s
        while True:
            found: list[Entry] = []
            for number in self._next:
                share = max((max_entries - len(found)) // len(self._next), 1)
                if len(found) < max_entries:
                    found += self._read_partition(number, share)
            if found or time.monotonic() >= end_s:
                self._next = dict([*list(self._next.items())[1:], *list(self._next.items())[:1]])
                return found
            time.sleep(min(POLL_S, max(end_s - time.monotonic(), 0)))

    def _read_partition(self, number: int, max_entries: int) -> list[Entry]:
        found = self._entries(number, self._next[number], max_entries)
        if found:
            self._next[number] = found[-1].next_offset
        return found

    def _entries(self, number: int, offset: int, max_entries: int) -> list[Entry]:
        """The entries of a partition from an offset on that are there now. Raises SourceError."""
        raise NotImplementedError


class Backlog:
    """Counts the entries from an offset to the end, looking at each of them twice at most while both move on."""

    def __init__(self, count: Callable[[int, int], int]) -> None:
        """count: how many entries have offsets from a to below b."""
        self._count, self._start, self._end, self._num = count, 0, 0, 0

    def behind(self, offset: int, end: int) -> int:
        if offset >= end:
            return 0
        if not self._start <= offset <= self._end <= end:
            self._start, self._end, self._num = offset, offset, 0
        self._num += self._count(self._end, end) - self._count(self._start, offset)
        self._start, self._end = offset, end
        return self._num
