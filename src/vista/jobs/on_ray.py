"""The Ray engine: blocks are folded by actors of a Ray cluster, each of which holds the model once.

Ray Data hands the blocks to the actors, holds back where results are not taken, and starts actors anew that died.
Results come to this process, which alone commits them: so a store of any kind will do, LMDB on a disk of this host too,
and a block that Ray folds twice is stored once. What a block needs is opened by the actor: the run folder and the
prepared data must be at the same path on every host. Ray is an extra; it is imported only here, and only when used.
"""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vista.errors import ConfigError, JobError, VistaWarning
from vista.jobs.blocks import Block
from vista.jobs.fold import FailedUser, Fold, Folded, FoldTask, reason_of
from vista.jobs.local import num_cores

LEAST_CPUS = 2  # Ray Data needs one beside the actors: a pool of all CPUs waits for ever, and says nothing
RETRIES = 1  # of a block whose actor died: the first death may have been chance
MOST_TASKS = 10_000  # of one run: each costs Ray some milliseconds and memory in this process
TASKS_PER_ACTOR = 1  # what waits at an actor that dies would share the blame, and the last ones would wait for one
CONNECT_TIMEOUT_S = 5
QUIET: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
SETTINGS = {"enable_progress_bars": False, "max_errored_blocks": -1}  # the progress is ours; so are lost blocks


class RayEngine:
    """Implements ``Engine``.

    address: of a cluster; None for one that runs on this host, and else a new one for this run, as with ``local``;
    workers: actors; None, or more than there is room for: one per CPU of the cluster, but for one. Raises ConfigError
    for fewer than one, JobError where Ray is not installed or nobody is at the address.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers = {workers}: at least 1, or leave it out for one per CPU but one")
        self._address, self._workers, self._ray = address, workers, _imported()
        if address not in (None, "auto", "local"):
            _check_somebody_is_at(str(address))

    def fold(self, fold: Fold, task: FoldTask, blocks: Sequence[Block]) -> Generator[Folded, None, None]:
        """Folds again, user by user, what was in the blocks that cost an actor its life twice."""
        if not blocks:
            return
        with self._cluster(), _settings(self._ray.data.DataContext.get_current()):
            size = self._num_actors(len(blocks))
            lost = yield from self._map(task, list(blocks), size)
            alone = [one for block in lost for one in block.one_by_one()]
            if alone:
                for block in (yield from self._map(task, alone, size)):
                    yield _given_up(block)

    def _map(self, task: FoldTask, blocks: list[Block], size: int) -> Generator[Folded, None, list[Block]]:
        """What became of blocks; returns those that were lost with their actors. Raises JobError."""
        num_tasks = min(len(blocks), MOST_TASKS)
        rows = [{"number": number, "block": pickle.dumps(block)} for number, block in enumerate(blocks)]
        spread = [row for first in range(num_tasks) for row in rows[first::num_tasks]]  # no task has all long ones
        pool = self._ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=TASKS_PER_ACTOR)
        with warnings.catch_warnings():  # without the last argument, what kills its actor is tried for ever
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            results = self._ray.data.from_items(spread, override_num_blocks=num_tasks).map_batches(
                Folder, fn_constructor_args=(task,), batch_size=1, batch_format="numpy", compute=pool, num_cpus=1,
                max_task_retries=RETRIES,
            )  # fmt: skip
        left = set(range(len(blocks)))
        for row in _errors_told(results.iter_rows(), self._ray):
            if row["number"] in left:
                left.remove(row["number"])
                yield pickle.loads(row["folded"])
        return [blocks[number] for number in sorted(left)]

    def _num_actors(self, num_blocks: int) -> int:
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if cpus < LEAST_CPUS:
            raise JobError(f"the Ray cluster has {cpus} CPUs, at least {LEAST_CPUS} are needed; use --engine local")
        if self._workers is not None and self._workers > cpus - 1:
            warnings.warn(
                f"workers = {self._workers}: the Ray cluster has {cpus} CPUs, one of which must be left; there will be "
                f"{cpus - 1}",
                VistaWarning,
                stacklevel=2,
            )
        return min(self._workers or cpus - 1, cpus - 1, num_blocks)

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        """Connected to a cluster: the one this process uses already, that of the address, or a new one."""
        if self._ray.is_initialized():
            yield
            return
        if self._address == "local" or not self._connect():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a new one would report itself to its makers
            cpus = 1 + (self._workers or max(num_cores() - 1, 1))
            self._ray.init(address="local", num_cpus=cpus, include_dashboard=False, **QUIET)
        try:
            yield
        finally:
            self._ray.shutdown()

    def _connect(self) -> bool:
        """Whether a cluster answers. Raises JobError where the one that was asked for does not."""
        try:
            self._ray.init(address=self._address or "auto", **QUIET)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if self._address is None:
                return False
            raise JobError(
                f"Ray at {self._address}: {reason_of(error)}; start it with: ray start --head, and if it asks for a "
                "token (said when it starts), set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error
        return True


class Folder:
    """The actor: one model, one thread."""

    def __init__(self, task: FoldTask) -> None:
        torch.set_num_threads(1)
        self._fold = task.open()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        folded = [pickle.dumps(self._fold(pickle.loads(block))) for block in batch["block"]]
        return {"number": batch["number"].tolist(), "folded": folded}


def _check_somebody_is_at(address: str) -> None:
    """Raise JobError where nobody listens: Ray itself would try for minutes, then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise JobError(
            f"ray_address {address!r}: {reason_of(error)}; give HOST:PORT as `ray start --head` shows it (or auto), "
            "and see that the cluster is up"
        ) from error


def _imported() -> Any:
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # read when it is imported, by actors too
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise JobError(
            f"the package ray is not installed ({error}); run: pip install 'vista-recsys[ray]', or use --engine local"
        ) from error
    return ray


@contextmanager
def _settings(context: Any) -> Iterator[None]:
    """Settings of Ray Data for this run: they belong to the whole process."""
    before = {name: getattr(context, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _errors_told(rows: Any, ray: Any) -> Iterator[dict[str, Any]]:
    """The rows; Ray's own errors as a JobError."""
    try:
        yield from rows
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]  # before it stands the traceback of the actor
        raise JobError(
            f"Ray cannot fold: {cause}; run folder and data must be at the same path on every host, and so must vista"
        ) from error


def _given_up(block: Block) -> Folded:
    reason = f"its Ray actor died, each of {1 + RETRIES} times; is there enough memory?"
    return Folded(failed=(FailedUser(block.user_ids.tolist()[0], reason, block.num_events),))
