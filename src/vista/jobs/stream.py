"""`vista stream`: events from a log into the states and tokens of a store, one micro-batch after the other.

A micro-batch is read, applied and stored before the next is read: what is in memory is a micro-batch at most, and a
store slower than the log shows as lag. Killed at any moment, the next process goes on as if nothing had been: how is
said in `vista.jobs.deliver` (each event once) and `vista.jobs.positions` (where to read on). docs/stream.md has it all.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vista.checkpoint import Run
from vista.config import ModelConfig
from vista.errors import ConfigError, RecordError, SourceError, StoreError, Superseded, VistaWarning
from vista.jobs.dead_letters import DeadLetters
from vista.jobs.deliver import IN_STATE, Block, Work, blocks, refresh, work_out
from vista.jobs.parse import NoEvent, Parsed, event_of, parse
from vista.jobs.pending import Cadence, Pending
from vista.jobs.positions import (
    DAMAGED,
    MALFORMED,
    OWNER_BYTES,
    PASSED_OVER,
    Position,
    load_positions,
    owned,
    position_write,
)
from vista.jobs.sources.contract import Entry, EventSource
from vista.jobs.stream_metrics import Metrics, MetricsServer, write_metrics
from vista.progress import Progress, duration, short
from vista.store.contract import SummaryStore, Write
from vista.updates.apply import (
    BAD_CLOCK,
    MOST_TRIES,
    OUTCOMES,
    TOO_LATE,
    USERS_AT_ONCE,
    UpdateOptions,
    check_model,
)

IDLE_S = 0.2  # how long a read waits for the first entry: tokens fall due and a stop is asked for meanwhile
STATUS_S = 1.0  # between looks at the lag; each asks the log
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # for a store or a log that is away: doubled from one to the other
REASONS = {
    TOO_LATE: "too late: older than what can be read again from what the state holds",
    BAD_CLOCK: "bad clock: before 1990, or ahead of the time of its arrival by more than five minutes",
}
DEAD = (*(OUTCOMES[outcome] for outcome in REASONS), MALFORMED, DAMAGED)
Result = TypeVar("Result")


@dataclass(frozen=True)
class StreamOptions:
    """How to stream.

    partitions: these alone, None for all there are and will be; max_events, max_ms: bounds of a micro-batch; cadence:
    when tokens are written; until_end: stop when the log is read; begin: begin the model version in a store that lacks
    it; since_us: pass over older events; log: the name under which offsets are kept, None for the source's own;
    metrics_port: 0 takes a free one. Raises ConfigError for values out of range.
    """

    dead_letters: Path = Path("dead-letters.jsonl")
    partitions: tuple[int, ...] | None = None
    max_events: int = 1000
    max_ms: float = 200.0
    cadence: Cadence = field(default_factory=Cadence)
    until_end: bool = False
    begin: bool = False
    since_us: int = 0
    log: str | None = None
    metrics_file: Path | None = None
    metrics_port: int | None = None
    update: UpdateOptions = field(default_factory=UpdateOptions)
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.max_events < 1 or self.max_ms < 0:
            raise ConfigError(f"a micro-batch of {self.max_events} events, {self.max_ms} ms: give 1 or more, 0 or more")
        if self.partitions is not None and (not self.partitions or min(self.partitions) < 0):
            raise ConfigError(f"partitions {self.partitions}: name at least one, from 0 on")


@dataclass(frozen=True)
class StreamReport:
    """What a call did. counts: entries by what became of them, those of earlier calls included."""

    num_entries: int
    num_batches: int
    num_refreshes: int
    counts: dict[str, int]
    positions: dict[int, Position]


class Stream:
    """One process' part of a log, on its way into a store. Not for several threads, but ``stop`` may be set by any."""

    def __init__(self, run: Run, store: SummaryStore, source: EventSource, options: StreamOptions) -> None:
        """Raises ConfigError, CheckpointError, SourceError or StoreError where this cannot be streamed."""
        check_model(run)
        check_gap(run.config.model, options.cadence)
        self._run, self._store, self._source, self._options = run, store, source, options
        self.stop = threading.Event()
        self._log = options.log or source.name
        self._owner = secrets.token_bytes(OWNER_BYTES)
        self._positions: dict[int, Position] = {}
        self._saved: dict[int, tuple[int, int, int]] = {}
        self._stored: dict[int, Write] = {}  # positions as they were last written; everything else is provided these
        self._pending = Pending(options.cadence)
        self.metrics = Metrics(run.version, self._log)
        self.metrics.positions = self._positions
        self._num_entries, self._looked_s, self._trouble = 0, -1.0, ""
        self._progress = Progress("stream", unit="events", quiet=options.quiet)
        self._begin_version()
        self._adopt(self._wanted())
        starts = {number: position.start_offset for number, position in self._positions.items()}
        self._dead = DeadLetters(options.dead_letters, self._log, starts)

    def _begin_version(self) -> None:
        version, config = self._run.version, self._run.config.model
        if version in [info.version for info in self._store.versions()]:
            return
        if not self._options.begin:
            raise StoreError(
                f"model version {version} is not in the store; run vista summarize first, or give --begin to start "
                "from an empty version"
            )
        self._store.begin_version(version, config.num_seeds, config.width, expected_users=0)

    # -- partitions

    def _wanted(self) -> list[int]:
        there = self._source.partitions()
        if self._options.partitions is None:
            return there
        missing = sorted(set(self._options.partitions) - set(there))
        if missing:
            raise SourceError(f"{self._source.name}: there is no partition {missing[0]}; there are {there}")
        return sorted(set(self._options.partitions))

    def _adopt(self, partitions: list[int]) -> None:
        """Take over partitions that are not streamed yet. Whoever streamed them stops at its next micro-batch."""
        new = [number for number in partitions if number not in self._positions]
        found = load_positions(self._store, self._run.version, self._log, new)
        self._positions |= {number: owned(position, self._owner) for number, position in found.items()}
        self._source.start({number: position.next_offset for number, position in self._positions.items()})
        self._save_positions()

    def _check_owner(self) -> None:
        """Raise ConfigError where another process has taken over a partition since."""
        found = load_positions(self._store, self._run.version, self._log, list(self._positions))
        for number, position in found.items():
            if position.owner != self._owner:
                known = "another process streams it" if position.updated_us >= 0 else "its offset was removed"
                raise ConfigError(
                    f"partition {number} of {self._log}: {known} since; stream a partition with one process at a time"
                )

    def _save_positions(self) -> None:
        """Store where to go on, as far as that has changed, and tell the log."""
        for number, position in self._positions.items():
            position.start_offset = self._pending.first_offset(number, position.next_offset)
        facts = {n: (p.start_offset, p.next_offset, int(p.counts.sum())) for n, p in self._positions.items()}
        changed = [n for n, fact in facts.items() if self._saved.get(n) != fact]
        if not changed:
            return
        writes = {number: position_write(self._positions[number], self._run.version, self._log) for number in changed}
        self._patiently("store", lambda: self._store_positions(writes))
        self._patiently("source", lambda: self._source.acknowledge({n: facts[n][0] for n in changed}))
        self._saved |= {number: facts[number] for number in changed}

    def _store_positions(self, writes: dict[int, Write]) -> None:
        """Those of partitions that are being taken over whatever is there, the others if they are still ours."""
        version, new = self._run.version, list(writes.values())
        try:
            self._store.commit(new, version, [self._stored[number] for number in writes if number in self._stored])
        except Superseded:  # perhaps by ourselves: an attempt of which only the answer was lost
            if self._store.get_many("position", [key for _, key, _ in new], version) != [blob for *_, blob in new]:
                raise
        self._stored |= writes

    # -- the loop

    def go(self) -> StreamReport:
        """Stream until stopped, or until the end of the log where that was asked for; what was begun is finished."""
        with self._progress, self._serving_metrics():
            self._report()
            while not self.stop.is_set():
                entries = self._gather()
                if entries:
                    self._take_in(entries)
                elif self._options.until_end and self._is_at_end():
                    break
                self._refresh_due()
                self._save_positions()
                self._report()
            self._finish()
        metrics = self.metrics
        return StreamReport(
            self._num_entries, metrics.num_batches, metrics.num_refreshes, metrics.counts(), dict(self._positions)
        )

    def _gather(self) -> list[Entry]:
        """A micro-batch, empty where nothing came for a while."""
        entries = self._read(self._options.max_events, IDLE_S)
        end_s = time.monotonic() + self._options.max_ms / 1000
        while entries and len(entries) < self._options.max_events and not self.stop.is_set():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            entries += self._read(self._options.max_events - len(entries), left_s, entries)
        self.metrics.num_buffered = len(entries)
        return entries

    def _read(self, max_entries: int, timeout_s: float, before: list[Entry] | None = None) -> list[Entry]:
        offsets = {number: position.next_offset for number, position in self._positions.items()}
        offsets |= {entry.partition: entry.next_offset for entry in before or ()}
        return self._patiently(
            "source",
            lambda: self._source.read(max_entries, timeout_s),
            lambda: self._source.start(offsets),  # what a failed read had already taken is read again
        )

    def _is_at_end(self) -> bool:
        ends = self._patiently("source", self._source.ends)
        return all(position.next_offset >= ends.get(n, 0) for n, position in self._positions.items())

    def _take_in(self, entries: list[Entry]) -> None:
        self._patiently("store", self._check_owner)
        parsed = parse(entries, self._log, self._options.since_us)
        self._patiently("dead letters", lambda: self._dead.add(parsed.bad))
        for entry, _ in parsed.bad:
            self._positions[entry.partition].count(MALFORMED)
        for number, count in parsed.num_passed.items():
            self._positions[number].count(PASSED_OVER, count)
        for block in blocks(self._run, parsed.delivery):
            self._take_block(block, parsed)
        for entry in entries:
            self._positions[entry.partition].next_offset = entry.next_offset
        self._num_entries += len(entries)
        self.metrics.num_batches += 1
        self.metrics.num_buffered = 0
        self._progress.advance(len(entries))

    def _take_block(self, block: Block, parsed: Parsed) -> None:
        """Store what a block changes. A damaged record stops the events of its user alone."""
        try:
            work = self._patiently("store", lambda: self._until_unchanged(lambda: self._store_block(block, parsed)))
        except RecordError as error:
            if len(block.user_ids) > 1:
                for one in block.by_user():
                    self._take_block(one, parsed)
                return
            reason = f"{DAMAGED} of user {block.user_ids[0]}: {error}"
            refused = [(parsed.entries[row], reason) for row in block.rows.tolist()]
            self._patiently("dead letters", lambda: self._dead.add(refused))
            for entry, _ in refused:
                self._positions[entry.partition].count(DAMAGED)
            return
        self._note(block, work, parsed)

    def _store_block(self, block: Block, parsed: Parsed) -> Work:
        counts = np.bincount(block.arrivals.user, minlength=len(block.user_ids)).tolist()
        now_s = time.monotonic()
        is_due = np.array(
            [self._pending.is_due(user, n, now_s) for user, n in zip(block.user_ids, counts, strict=True)], bool
        )
        work = work_out(self._run, self._store, block, self._options.update, is_due)
        refused = [
            (parsed.entries[row], REASONS[outcome])
            for row, outcome in zip(block.rows.tolist(), work.outcome.tolist(), strict=True)
            if outcome in REASONS
        ]
        self._dead.add(refused)  # first: once the marks are stored, nobody looks at these events again
        if work.writes:
            self._store.commit(work.writes, self._run.version, [*self._stored.values(), *work.provided])
        return work

    def _note(self, block: Block, work: Work, parsed: Parsed) -> None:
        """Count what became of the events, and whose tokens are behind now."""
        now_s, now_us = time.monotonic(), time.time_ns() // 1000
        columns = (block.rows, work.outcome, block.arrivals.user, block.arrivals.timestamp_us)
        for row, outcome, user, event_us in zip(*(column.tolist() for column in columns), strict=True):
            entry = parsed.entries[row]
            self._positions[entry.partition].count(OUTCOMES[outcome])
            if outcome in IN_STATE:
                arrived_us = entry.arrived_us if entry.arrived_us >= 0 else now_us
                self._pending.add(block.user_ids[user], entry.partition, entry.offset, arrived_us, event_us, now_s)
        for user in np.flatnonzero(work.has_tokens).tolist():
            self._written(block.user_ids[user])

    # -- tokens

    def _written(self, user_id: Any) -> None:
        waited = self._pending.written(user_id)
        if waited is not None:
            now_us = time.time_ns() // 1000
            self.metrics.refreshed((now_us - waited.event_us) / 1e6, (now_us - waited.arrived_us) / 1e6)

    def _refresh_due(self) -> None:
        while users := self._pending.due(time.monotonic(), USERS_AT_ONCE):
            self._refresh(users)

    def _refresh(self, user_ids: list[Any]) -> None:
        def store() -> None:
            writes, provided = refresh(self._run, self._store, user_ids, self._options.update.codec)
            if writes:
                self._store.commit(writes, self._run.version, [*self._stored.values(), *provided])

        try:
            self._patiently("store", lambda: self._until_unchanged(store))
        except RecordError:  # its events are dead letters, or will be when the next one comes
            if len(user_ids) > 1:
                for user_id in user_ids:
                    self._refresh([user_id])
        for user_id in user_ids:
            self._written(user_id)

    def _finish(self) -> None:
        while users := self._pending.some(USERS_AT_ONCE):
            self._refresh(users)
        self._save_positions()
        if self._options.begin and self._options.until_end and not self.stop.is_set():
            self._patiently("store", lambda: self._store.complete_version(self._run.version))
        self._report(is_last=True)

    def _until_unchanged(self, attempt: Callable[[], Result]) -> Result:
        """Do something anew where another process changed a state meanwhile.

        Raises ConfigError where one took a partition over, Superseded where one was faster each time.
        """
        for tries_left in reversed(range(MOST_TRIES)):
            try:
                return attempt()
            except Superseded:
                self._check_owner()
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    # -- waiting and telling

    def _patiently(self, part: str, action: Callable[[], Result], recover: Callable[[], None] | None = None) -> Result:
        """Do something until it succeeds: a store or a log that is away comes back. Asked to stop, raises its error."""
        wait_s, has_failed = FIRST_WAIT_S, False
        while True:
            try:
                if has_failed and recover is not None:
                    recover()
                result = action()
            except RecordError:
                raise
            except Superseded:
                self._check_owner()
                raise
            except (StoreError, SourceError) as error:
                has_failed = True
                self.metrics.num_retries += 1
                self._trouble = f"{part} away for now: {error}"
                self._check_version()
                if self.stop.is_set():
                    raise
                self._report()
                self.stop.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                if has_failed:
                    self._trouble = ""
                self.metrics.is_up[part] = True
                return result
            self.metrics.is_up[part] = False

    def _check_version(self) -> None:
        """Raise StoreError where the store answers and the model version is gone: waiting would not bring it back."""
        try:
            versions = [info.version for info in self._store.versions()]
        except StoreError:
            return
        if self._run.version not in versions:
            raise StoreError(f"model version {self._run.version} was removed from the store; nothing can be streamed")

    def _report(self, is_last: bool = False) -> None:
        """Look at the lag, at most once a second, and show it."""
        now_s = time.monotonic()
        if now_s - self._looked_s < STATUS_S and not is_last:
            return
        is_first, self._looked_s = self._looked_s < 0, now_s
        metrics = self.metrics
        metrics.num_pending = len(self._pending)
        try:
            metrics.set_lag(*lag(self._source, self._positions))
            if self._options.partitions is None and not self._trouble and not is_last:
                self._adopt_new()
        except SourceError as error:
            self._trouble = self._trouble or f"source away for now: {error}"
        self._write_metrics(is_first)
        counts = metrics.counts()
        self._progress.update(
            lag=short(sum(metrics.lag_events.values())), behind=duration(max(metrics.lag_s.values(), default=0.0)),
            fresh=duration(metrics.from_arrival.last_s), dead=sum(counts.get(name, 0) for name in DEAD),
            state=self._trouble or None,
        )  # fmt: skip

    def _adopt_new(self) -> None:
        there = self._source.partitions()
        if set(there) - set(self._positions):
            self._adopt(there)

    def _write_metrics(self, is_first: bool) -> None:
        """A file that cannot be written is an error at the start; later on it is no reason to stop."""
        path = self._options.metrics_file
        if path is None:
            return
        try:
            write_metrics(self.metrics, path)
        except OSError as error:
            if is_first:
                raise ConfigError(f"--metrics-file {path}: cannot be written ({error.strerror})") from error
            self._trouble = self._trouble or f"metrics cannot be written: {error.strerror}"

    @contextmanager
    def _serving_metrics(self) -> Iterator[None]:
        if self._options.metrics_port is None:
            yield
            return
        server = MetricsServer(self.metrics, self._options.metrics_port)
        self.metrics.port = server.port
        try:
            yield
        finally:
            server.close()


def check_gap(model: ModelConfig, cadence: Cadence) -> None:
    """Raise ConfigError where tokens may get older than the recent events reach back; warn where readers may wait.

    Tokens are as of the newest border before they were written: a cadence of N events leaves up to N + S - 2 events out
    of them, and R recent events must reach as far, or some would be in neither.
    """
    if cadence.events is not None and model.kind == "vista":
        gap = cadence.events + model.segment_events - 2
        if gap > model.recent_events:
            most = model.recent_events - model.segment_events + 2
            raise ConfigError(
                f"--refresh-after events={cadence.events}: tokens would be up to {gap} events old, more than the "
                f"{model.recent_events} recent events of this model, so that some events would be in neither; give "
                f"events={most} at most, or train with recent_events of {gap} or more"
            )
    if cadence.most_unread > 0:
        least = "any number of" if cadence.events is None else f"up to {cadence.most_unread:.0f}"
        warnings.warn(
            f"--refresh-after: between two writes of a user's tokens, rankings know nothing of {least} of the newest "
            "events; events=1, the default, writes them with every micro-batch",
            VistaWarning,
            stacklevel=3,
        )


@contextmanager
def stopped_by_signals(stream: Stream) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask a stream to stop; a second Ctrl-C ends it at once, and loses nothing either."""

    def ask(number: int, _: object) -> None:
        if stream.stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt("what was stored is kept; the next stream goes on from there")
        stream.stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lag(source: EventSource, positions: dict[int, Position]) -> tuple[dict[int, int], dict[int, float]]:
    """Entries behind each position, and the age in seconds of the first of them (0 where there is none).

    The age counts from the arrival; where the log does not know it, from the event's own time. Raises SourceError.
    """
    offsets = {number: position.next_offset for number, position in positions.items()}
    num_behind = source.num_behind(offsets)
    behind_s = {n: _age_s(source.peek(n, offsets[n])) if num_behind[n] else 0.0 for n in offsets}
    return num_behind, behind_s


def _age_s(entry: Entry | None) -> float:
    if entry is None:
        return 0.0
    since_us = entry.arrived_us
    if since_us < 0:
        try:
            since_us = event_of(entry.value)[2]
        except NoEvent:
            return 0.0
    return max(time.time_ns() // 1000 - since_us, 0) / 1e6
