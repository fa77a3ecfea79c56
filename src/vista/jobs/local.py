"""The local engine: blocks are folded by processes of this machine, or in this one where that is enough.

This process alone hands out blocks and takes results, so that one writer commits them, whatever store it is. A worker
has one block at a time and waits until its result is taken: nothing piles up. It is a fresh Python, not a fork (torch
and LMDB do not survive one), maps the histories into memory, and ends at once when the other end of its connection is
gone, however this process ended. A worker that dies is replaced, and its block folded again; a block that kills its
worker again and again is folded user by user, and a user that does is reported as failed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self

import torch

from vista.errors import ConfigError, JobError, VistaError
from vista.jobs.blocks import Block
from vista.jobs.fold import FailedUser, Fold, Folded, FoldTask
from vista.jobs.worker import READY

WORKER = (sys.executable, "-m", "vista.jobs.worker")
EVENTS_PER_WORKER = 500_000  # with less to do, a worker costs more than it saves: it starts for some seconds
MOST_DEATHS = 2  # of workers under one block: the first may have been chance, or a lack of memory that has passed
MOST_FAILED_STARTS = 3  # in a row


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine:
    """Implements ``Engine``. workers: how many processes; None: one per core, and fewer where there is little to do.

    command: how a worker is started; it gets the number of its connection's file descriptor as last argument.
    Raises ConfigError for fewer workers than one.
    """

    def __init__(self, workers: int | None = None, command: Sequence[str] | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers = {workers}: at least 1, or leave it out for one per core")
        self._workers, self._command = workers, tuple(command or WORKER)

    def fold(self, fold: Fold, task: FoldTask, blocks: Sequence[Block]) -> Generator[Folded, None, None]:
        workers = self._workers or min(num_cores(), sum(b.num_events for b in blocks) // EVENTS_PER_WORKER)
        if min(workers, len(blocks)) > 1:
            with _Pool(min(workers, len(blocks)), self._command, task, blocks) as pool:
                yield from pool.results()
            return
        with _one_thread():
            yield from map(fold, blocks)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a worker has it: other numbers of threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Attempt:
    """A block and how many workers died of it."""

    block: Block
    num_deaths: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    is_ready: bool = False
    attempt: _Attempt | None = None


class _Pool:
    """Some workers, and which block each of them has."""

    def __init__(self, size: int, command: tuple[str, ...], task: FoldTask, blocks: Sequence[Block]) -> None:
        self._size, self._command, self._task = size, command, task
        self._waiting = deque(_Attempt(block) for block in blocks)
        self._workers: dict[Connection, _Worker] = {}
        self._num_failed_starts = 0

    def results(self) -> Iterator[Folded]:
        """What becomes of the blocks, in any order; each once. Raises JobError where no worker starts."""
        while True:
            self._hand_out()
            if not any(worker.attempt for worker in self._workers.values()):
                return
            for connection in wait(list(self._workers)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    yield from self._bury(connection)
                else:
                    yield from self._take(self._workers[connection], message)

    def _hand_out(self) -> None:
        """A block for every idle worker; a new worker for what is left, while there are fewer than there may be."""
        for connection, worker in self._workers.items():
            if worker.attempt is None and self._waiting:
                self._give(connection, worker)
        while self._waiting and len(self._workers) < self._size:
            connection = self._start()
            self._give(connection, self._workers[connection])

    def _give(self, connection: Connection, worker: _Worker) -> None:
        worker.attempt = self._waiting.popleft()
        with suppress(OSError):  # it has died; so will the next reading say
            connection.send(worker.attempt.block)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(  # a group of its own: Ctrl-C is for this process, which ends its workers
                [*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()], process_group=0, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        connection = Connection(ours.detach())
        self._workers[connection] = _Worker(process)
        with suppress(OSError):  # as above
            connection.send(self._task)
        return connection

    def _take(self, worker: _Worker, message: Folded | VistaError | str) -> Iterator[Folded]:
        if isinstance(message, VistaError):
            raise message
        if isinstance(message, Folded):
            worker.attempt = None
            yield message
        else:
            assert message == READY, message
            worker.is_ready, self._num_failed_starts = True, 0

    def _bury(self, connection: Connection) -> Iterator[Folded]:
        """Put the block of a dead worker back to the front; or its users one by one, or give up the user."""
        worker = self._workers.pop(connection)
        connection.close()
        worker.process.kill()  # whose end of the connection is gone, but who may still be there
        status = worker.process.wait()
        attempt = worker.attempt
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MOST_FAILED_STARTS:
                raise JobError(
                    f"{self._num_failed_starts} workers in a row ended before they were ready (the last with status "
                    f"{status}); what they said is above. Run again with --workers 1"
                )
        elif attempt is not None:
            attempt.num_deaths += 1
            if attempt.num_deaths >= MOST_DEATHS and len(attempt.block.users) == 1:
                yield _given_up(attempt.block, status)
                return
            if attempt.num_deaths >= MOST_DEATHS:
                self._waiting.extendleft(_Attempt(one) for one in reversed(attempt.block.one_by_one()))
                return
        if attempt is not None:
            self._waiting.appendleft(attempt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all workers: they hold nothing that is not folded again."""
        for worker in self._workers.values():
            worker.process.kill()
        for connection, worker in self._workers.items():
            worker.process.wait()
            connection.close()


def _given_up(block: Block, status: int) -> Folded:
    reason = f"its worker ended with status {status}, each of {MOST_DEATHS} times; is there enough memory?"
    return Folded(failed=(FailedUser(block.user_ids.tolist()[0], reason, block.num_events),))
