"""Entries that a stream could not apply, in a file of JSON lines, each with its place in the log and the reason.

Written before the states of the same micro-batch, so that a crash loses none; an entry that is delivered again is not
written again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from vista.errors import SourceError
from vista.jobs.sources.contract import Entry
from vista.jobs.sources.directory import append_lines


class DeadLetters:
    """The file at ``path``; made with the first entry that goes there."""

    def __init__(self, path: Path, log: str, offsets: Mapping[int, int]) -> None:
        """offsets: where the stream starts in each partition; what is in the file from there on is not written again.

        Raises SourceError for a file that cannot be read or written.
        """
        self.path, self._log = path, log
        self._known: set[tuple[int, int]] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._look(offsets)
                path.open("ab").close()  # now, and not in the middle of a stream, is the time to say that it cannot be
        except OSError as error:
            raise SourceError(
                f"{path}: dead letters cannot be kept there ({error.strerror}); name a file with --dead-letters"
            ) from error

    def _look(self, offsets: Mapping[int, int]) -> None:
        with self.path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line)
                    place = int(found["partition"]), int(found["offset"])
                except (ValueError, KeyError, TypeError):  # torn, or not ours
                    continue
                if found.get("log") == self._log and place[1] >= offsets.get(place[0], 0):
                    self._known.add(place)

    def add(self, entries: list[tuple[Entry, str]]) -> None:
        """Write entries with their reasons. Raises SourceError."""
        new = [(e, reason) for e, reason in entries if (e.partition, e.offset) not in self._known]
        if new:
            append_lines(self.path, [self._line(entry, reason) for entry, reason in new])
            self._known.update((entry.partition, entry.offset) for entry, _ in new)

    def _line(self, entry: Entry, reason: str) -> bytes:
        facts = {"log": self._log, "partition": entry.partition, "offset": entry.offset, "reason": reason}
        facts |= {"refused_us": time.time_ns() // 1000, "value": entry.value.decode("utf-8", "backslashreplace")}
        return json.dumps(facts, ensure_ascii=True).encode() + b"\n"

    def forget(self, offsets: Mapping[int, int]) -> None:
        """Entries below these offsets will not be delivered again."""
        self._known = {place for place in self._known if place[1] >= offsets.get(place[0], 0)}
