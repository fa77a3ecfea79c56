"""Bulk: every user's history to a summary record in a store.

Plan, fold, commit. Only users whose history goes beyond their *watermark* (how many events their stored record holds,
and up to when) are planned, in blocks (`vista.jobs.blocks`). An engine folds the blocks, wherever it likes and in any
order (`vista.jobs.local`, `vista.jobs.on_ray`). This process commits each block as it comes, all or none. So an
interrupted run goes on where it stopped, and a block that is folded twice is stored once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from vista.checkpoint import Run, write_popularity
from vista.data.histories import PreparedData
from vista.data.popularity import latest_table
from vista.errors import ConfigError, RecordError, VistaWarning, nearest
from vista.jobs.blocks import USERS_AT_ONCE, Block, plan
from vista.jobs.fold import FailedUser, Fold, Folded, FoldTask
from vista.jobs.local import LocalEngine
from vista.progress import Progress, short
from vista.store.contract import SummaryStore
from vista.store.record import CODECS, unpack, user_key

EVENTS_PER_USER = 150  # what a user costs beside reading the history, in events: for the time left
CPU = torch.device("cpu")
ENGINES = ("local", "ray")
Results = Generator[Folded, None, None]


class Engine(Protocol):
    """What folds blocks."""

    def fold(self, fold: Fold, task: FoldTask, blocks: Sequence[Block]) -> Results:
        """What became of the blocks' users, each of them once, in any order; ends its processes when it is closed.

        fold: for whoever folds in this process; task: to make one in another. Raises JobError where it cannot work.
        """


@dataclass(frozen=True)
class SummarizeReport:
    """What a bulk run did: users and events summarized, users passed over because their record was current.

    failed: users left without a new record. is_complete: all users were folded, or too few failed to matter
    (`vista.store.versions.LEAST_COVERAGE`); without that a version is not published. num_expected: users in the data.
    """

    num_users: int
    num_events: int
    num_current: int
    num_expected: int
    version: str
    failed: tuple[FailedUser, ...]
    is_complete: bool
    is_published: bool


def make_engine(
    name: str = "local", workers: int | None = None, ray_address: str | None = None, device: torch.device = CPU
) -> Engine:
    """An engine by name, for a run whose model is on ``device``: a GPU is fed by one process, this one.

    Raises ConfigError for an unknown one, for no workers, for an address without Ray, and for several workers or Ray
    with a GPU.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r}{nearest(name, ENGINES)}")
    if device.type != "cpu":
        if name != "local" or workers not in (None, 1):
            raise ConfigError(f"device {device}: one process of engine local feeds it; leave out engine and workers")
        return LocalEngine(1)
    if name == "ray":
        from vista.jobs.on_ray import RayEngine

        return RayEngine(ray_address, workers)
    if ray_address is not None:
        raise ConfigError(f"ray_address = {ray_address!r} is for engine ray; add --engine ray")
    return LocalEngine(workers)


def summarize(
    run: Run,
    data: PreparedData,
    store: SummaryStore,
    codec: str = "int8",
    all_users: bool = False,
    quiet: bool = False,
    publish: bool = True,
    engine: Engine | None = None,
) -> SummarizeReport:
    """Summarize users of ``data`` into ``store``, then mark the version as complete and publish it.

    all_users: also those whose record is current. Users that cannot be folded are left out and reported; the version
    is complete all the same if so many are there that it can be published. The run's table of popularity, where its
    model reads one, is made anew from ``data``. Raises CheckpointError for data the run was not trained on, and
    KeyboardInterrupt, with what was kept.
    """
    assert codec in CODECS, codec
    run.check_data(data.manifest, data.catalogue, data.folder)
    histories, shape = data.histories, run.sequence_model.config
    store.begin_version(run.version, shape.num_seeds, shape.width, expected_users=histories.num_users)
    is_wanted = np.ones(histories.num_users, bool) if all_users else is_beyond(data, store, run.version, quiet)
    blocks = plan(histories.lengths(), data.user_ids, is_wanted)
    done = _Done()
    try:
        _fold_all(engine or LocalEngine(), blocks, run, data, store, codec, done, quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{done.num_users:,} users were summarized and are in the store; run the same command again to go on"
        ) from None
    refresh_popularity(run, data)
    is_complete = not done.failed or _is_covered(store, run.version)
    if is_complete:
        store.complete_version(run.version)
        if publish:
            store.publish(run.version)
    return SummarizeReport(
        done.num_users, done.num_events, int((~is_wanted).sum()), histories.num_users, run.version, tuple(done.failed),
        is_complete, is_complete and publish,
    )  # fmt: skip


def refresh_popularity(run: Run, data: PreparedData) -> None:
    """Make the run's table of popularity anew from ``data``, where its model reads one."""
    if run.config.model.has_popularity:
        write_popularity(run.folder, *latest_table(data))


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


@dataclass
class _Done:
    """What has come of a run so far."""

    num_users: int = 0
    num_events: int = 0
    failed: list[FailedUser] = field(default_factory=list)

    def add(self, folded: Folded) -> None:
        self.num_users += folded.num_users
        self.num_events += folded.num_events
        self.failed += folded.failed


def _fold_all(
    engine: Engine, blocks: list[Block], run: Run, data: PreparedData, store: SummaryStore, codec: str, done: _Done,
    quiet: bool,
) -> None:  # fmt: skip
    """Have all blocks folded, and commit each as it comes."""
    fold, task = Fold(run, data.histories, codec), FoldTask.of(run, data, codec)
    total, num_users = data.histories.num_events, sum(len(block.users) for block in blocks)
    before = total - sum(block.num_events for block in blocks)
    start_s = time.monotonic()
    with (
        Progress(
            "summarize",
            total=total,
            unit="events",
            quiet=quiet,
            done=before,
            work=total - before + EVENTS_PER_USER * num_users,
        ) as progress,
        closing(engine.fold(fold, task, blocks)) as results,
    ):
        for folded in results:
            if folded.writes:
                if not done.num_users:
                    _restart_streams(store, run.version)
                store.commit(folded.writes, version=run.version)
            done.add(folded)
            rate = done.num_users / max(time.monotonic() - start_s, 1e-3)
            users = f"{short(done.num_users)}/{short(num_users)} ({short(rate)}/s)"
            num_events = folded.num_events + sum(user.num_events for user in folded.failed)
            work = num_events + EVENTS_PER_USER * (folded.num_users + len(folded.failed))
            progress.advance(num_events, work, users=users, failed=len(done.failed) or None)


def is_beyond(data: PreparedData, store: SummaryStore, version: str, quiet: bool = False) -> np.ndarray:
    """Whose history goes beyond the watermark of their stored record, by user index, (U,) bool.

    A record that is ahead of the data, as a stream of events makes it, is current. One that cannot be read is made
    anew, like one that is not there.
    """
    histories, keys = data.histories, [user_key(user) for user in data.user_ids.tolist()]
    lengths, last_us = histories.lengths(), np.full(len(keys), -1)
    ends = np.minimum(histories.offsets[1:], histories.num_events)
    last_us[lengths > 0] = histories.timestamp_us[ends[lengths > 0] - 1]
    found = np.ones(len(keys), bool)
    with Progress("look for new events", total=len(keys), unit="users", quiet=quiet) as progress:
        for start in range(0, len(keys), USERS_AT_ONCE):
            some = slice(start, start + USERS_AT_ONCE)
            for place, blob in enumerate(store.get_many("tokens", keys[some], version), start):
                num_events, as_of_us = _watermark(blob, version)
                found[place] = num_events < lengths[place] or as_of_us < last_us[place]
            progress.advance(len(keys[some]))
    return found


def _watermark(blob: bytes | None, version: str) -> tuple[int, int]:
    """How many events a record holds and the time of the last one; less than anything where there is no record."""
    try:
        stored = None if blob is None else unpack(blob, version)
    except RecordError:
        stored = None
    return (-1, -1) if stored is None else (stored.num_events, stored.as_of_us)


def _is_covered(store: SummaryStore, version: str) -> bool:
    return any(info.is_covered for info in store.versions() if info.version == version)
