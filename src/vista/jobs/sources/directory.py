"""A log in a folder: one append-only file of JSON lines per partition, ``0.jsonl``, ``1.jsonl``, ...

An offset is a place in the file, in bytes. A line counts when its line break is there: what stands behind the last one
is a line under way, or torn by a crash, and is waited for. Who appends next ends a torn line first, so that it spoils
itself alone. Files are never cut or moved; a log that is too long is left for another folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from vista.errors import SourceError
from vista.jobs.sources.contract import LONGEST_VALUE, Backlog, Entry, PolledSource, partition_of

SUFFIX = ".jsonl"
READ_BYTES = 1 << 18  # of one partition in one read
COUNT_BYTES = 1 << 20
ARRIVED = "arrived_us"
ARRIVAL = re.compile(rb'"arrived_us": ?([0-9]{1,18})[,} ]')  # what the writer put in; no line is parsed for it here


class DirectoryLog:
    """The writing side: ``DirectoryLog(path, num_partitions=4).append([{"user_id": 7, ...}, ...])``.

    Events are dictionaries as docs/stream.md has them; the partition is that of the user, the time of arrival is added
    where it is not given. Many processes may append to one log. Raises SourceError where the folder cannot be written,
    or has another number of partitions.
    """

    def __init__(self, path: Path | str, num_partitions: int = 1) -> None:
        self.path, self.num_partitions = Path(path), num_partitions
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = partition_files(self.path)
            if there and sorted(there) != list(range(num_partitions)):
                raise SourceError(
                    f"{path}: has the partitions {sorted(there)}, not {num_partitions}; give their number"
                )
            for number in range(num_partitions):
                (self.path / f"{number}{SUFFIX}").touch()
        except OSError as error:
            raise _cannot(self.path, "written", error) from error

    def append(self, events: list[dict[str, Any]]) -> None:
        """Add events; on disk when it returns. Killed in between, of each partition the first so many are there."""
        now_us = time.time_ns() // 1000
        lines: dict[int, list[bytes]] = {}
        for event in events:
            line = json.dumps({**event, ARRIVED: event.get(ARRIVED, now_us)}, ensure_ascii=False)
            lines.setdefault(partition_of(event["user_id"], self.num_partitions), []).append(line.encode() + b"\n")
        for number, own in sorted(lines.items()):
            append_lines(self.path / f"{number}{SUFFIX}", own)


def append_lines(path: Path, lines: list[bytes]) -> None:
    """Add whole lines to a file, behind a line break where a torn line is at its end; on disk when it returns."""
    try:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: another writer's half line is not a torn one
            with path.open("rb") as other:
                size = other.seek(0, os.SEEK_END)
                other.seek(max(size - 1, 0))
                is_torn = other.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_torn + b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot(path, "written", error) from error


def partition_files(path: Path) -> dict[int, Path]:
    """The files of a log by partition, in order."""
    found = {int(p.stem): p for p in path.iterdir() if p.suffix == SUFFIX and p.stem.isdecimal()}
    return dict(sorted(found.items()))


class DirectorySource(PolledSource):
    """Implements ``EventSource``."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.name = f"dir:{self.path.resolve()}"
        super().__init__()
        self._backlogs: dict[int, Backlog] = {}
        if not path or not self.path.is_dir():
            raise SourceError(
                f"{path or 'dir:'}: there is no folder; an event log is a folder of files 0{SUFFIX}, 1{SUFFIX}, ..."
            )
        self.partitions()

    def partitions(self) -> list[int]:
        try:
            return list(partition_files(self.path))
        except OSError as error:
            raise _cannot(self.path, "read", error) from error

    def start(self, offsets: Mapping[int, int]) -> None:
        ends = self.ends()
        for number, offset in offsets.items():
            if number not in ends:
                raise SourceError(f"{self.path}: there is no partition {number}; there are {sorted(ends)}")
            if offset > self._file_end(number):
                raise SourceError(
                    f"{self._file(number)}: ends before byte {offset:,}, up to which it has been read; is it another "
                    "log? Give it another name with --log, and look at --since"
                )
        self._next = dict(offsets)

    def _entries(self, number: int, offset: int, max_entries: int) -> list[Entry]:
        """The whole lines from an offset on."""
        content = self._bytes(number, offset, READ_BYTES)
        if b"\n" not in content and len(content) == READ_BYTES:
            return self._overlong(number, offset)
        found: list[Entry] = []
        start = 0
        while len(found) < max_entries and (end := content.find(b"\n", start) + 1):
            value = content[start : min(end - 1, start + LONGEST_VALUE + 1)]
            found.append(Entry(number, offset + start, offset + end, value, _arrival(value)))
            start = end
        return found

    def _overlong(self, number: int, offset: int) -> list[Entry]:
        """A line longer than what is read at once, cut; nothing while it has no end."""
        end = offset
        while content := self._bytes(number, end, READ_BYTES):
            if place := content.find(b"\n") + 1:
                return [Entry(number, offset, end + place, self._bytes(number, offset, LONGEST_VALUE + 1))]
            end += len(content)
        return []

    def ends(self) -> dict[int, int]:
        return {number: self._whole_end(number) for number in self.partitions()}

    def _whole_end(self, number: int) -> int:
        """Behind the last line break of a partition."""
        end = self._file_end(number)
        while end:
            start = max(end - COUNT_BYTES, 0)
            place = self._bytes(number, start, end - start).rfind(b"\n") + 1
            if place:
                return start + place
            end = start
        return 0

    def num_behind(self, offsets: Mapping[int, int]) -> dict[int, int]:
        ends, counts = self.ends(), {}
        for number, offset in offsets.items():
            backlog = self._backlogs.setdefault(number, Backlog(lambda a, b, p=number: self._count(p, a, b)))  # type: ignore[misc]
            counts[number] = backlog.behind(offset, ends.get(number, 0))
        return counts

    def _count(self, number: int, start: int, end: int) -> int:
        """Lines that begin from one offset to below another."""
        count = 0
        while start < end:
            content = self._bytes(number, start, min(COUNT_BYTES, end - start))
            if not content:
                break
            count += content.count(b"\n")
            start += len(content)
        return count

    def peek(self, partition: int, offset: int) -> Entry | None:
        return next(iter(self._entries(partition, offset, 1)), None)

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        """Nothing to do: the files stay."""

    def _file(self, number: int) -> Path:
        return self.path / f"{number}{SUFFIX}"

    def _file_end(self, number: int) -> int:
        try:
            return self._file(number).stat().st_size
        except OSError as error:
            raise _cannot(self._file(number), "read", error) from error

    def _bytes(self, number: int, start: int, num_bytes: int) -> bytes:
        try:
            with self._file(number).open("rb") as file:
                file.seek(start)
                return file.read(num_bytes)
        except OSError as error:
            raise _cannot(self._file(number), "read", error) from error

    def close(self) -> None:
        """Nothing is kept open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arrival(line: bytes) -> int:
    found = ARRIVAL.search(line)
    return int(found[1]) if found else -1


def _cannot(path: Path, done: str, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be {done} ({error.strerror}); check the path, its owner and free space")
