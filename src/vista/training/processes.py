"""The processes that train one model together: all hold the same weights and take the same steps, each computes its
lanes.

``torchrun`` starts them and says in the environment who is who. They talk through gloo, and GPUs through nccl; one
process alone talks to nobody, and none of this costs it anything.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vista.errors import ConfigError, TrainingError, VistaError

APART_S = 0.1  # between the ends of two processes
PATIENCE = timedelta(hours=6)  # of those that wait for one that writes; one that died is noticed by its connection
BACKENDS = "cpu:gloo,cuda:nccl"  # tensors go the way of the device they are on
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE: what torchrun sets

Value = TypeVar("Value")


def own_rank() -> int:
    """Which of the processes that torchrun started this one is; 0 where it started none."""
    return int(os.environ.get("RANK", 0)) if num_started() > 1 else 0


def num_started() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_others() -> Processes:
    """Connect the processes that torchrun started; without torchrun, this one alone. A group that is there is used.

    The group lives as long as the process: a second one would find the first one's addresses. Raises ConfigError for
    half an environment, TrainingError where the others cannot be reached.
    """
    if not dist.is_initialized():
        if num_started() == 1:
            return Processes()
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes "
                "with torchrun -m vista.cli.main train ..., or unset WORLD_SIZE to train in one"
            )
        with _others_may_end():
            dist.init_process_group(BACKENDS if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. Every method is called by all of them, in the same order."""

    rank: int = 0
    number: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def first(self, work: Callable[[], None]) -> None:
        """Have the first process do something while the others wait. Its VistaError is raised in all of them."""
        error: VistaError | None = None
        if self.is_first:
            try:
                work()
            except VistaError as raised:
                error = raised
        error = self.collect(error)[0]
        if error is not None:
            raise error

    def collect(self, mine: Value) -> list[Value]:
        """What each process has, in order of rank: anything that can be pickled."""
        if self.number == 1:
            return [mine]
        found: list[Value] = [mine] * self.number
        with _others_may_end():
            dist.all_gather_object(found, mine)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element by element, over all processes."""
        if self.number == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._sum(total)
        return total.tolist()

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes what the first one has."""
        if self.number > 1:
            with _others_may_end():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def exchange(self, mine: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """Rows sent to the processes, sent[i] to each in turn, against those that they sent here, got[i] from each."""
        received = mine.new_empty(sum(got), *mine.shape[1:])
        with _others_may_end():
            dist.all_to_all_single(received, mine.contiguous(), got, sent)
        return received

    def to_first(self, mine: Tensor, lengths: list[int]) -> list[Tensor] | None:
        """The rows (n, ...) of each process, in the first one; lengths: how many each has."""
        padded = mine.new_zeros(max(lengths), *mine.shape[1:])
        padded[: len(mine)] = mine.detach()
        found = [torch.empty_like(padded) for _ in lengths] if self.is_first else None
        with _others_may_end():
            dist.gather(padded, found)
        return None if found is None else [rows[:n] for rows, n in zip(found, lengths, strict=True)]

    def sum_gradients(self, dense: Sequence[nn.Parameter], tables: Sequence[nn.Parameter]) -> None:
        """Make each gradient the sum over all processes, the same to the last bit in all of them.

        dense are summed in one message, tables (whose gradients are sparse) by their rows. A parameter that no process
        has a gradient of keeps none.
        """
        if self.number == 1:
            return
        has_gradient = torch.tensor([float(p.grad is not None) for p in dense], device=dense[0].device)
        flat = torch.cat([has_gradient, *(_gradient(p).flatten() for p in dense)])
        self._sum(flat)
        pieces = flat[len(dense) :].split([p.numel() for p in dense])
        for p, has, piece in zip(dense, flat[: len(dense)].tolist(), pieces, strict=True):
            p.grad = piece.view_as(p) if has else None
        for table in tables:
            self._sum_rows(table)

    def _sum_rows(self, table: nn.Parameter) -> None:
        rows, values = table.new_zeros(0, dtype=torch.int64), table.new_zeros(0, table.shape[1])
        if table.grad is not None:
            gradient = table.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
        lengths = [int(n) for n in self.sum([len(rows) * (rank == self.rank) for rank in range(self.number)])]
        rows, values = self._gather(rows, lengths), self._gather(values, lengths)
        table.grad = rows_gradient(rows, values, table) if len(rows) else None

    def _gather(self, mine: Tensor, lengths: list[int]) -> Tensor:
        """The rows (n, ...) of all processes below one another; lengths: how many each has."""
        padded = mine.new_zeros(max(lengths), *mine.shape[1:])
        padded[: len(mine)] = mine.detach()
        found = [torch.empty_like(padded) for _ in lengths]
        if len(padded):
            with _others_may_end():
                dist.all_gather(found, padded)
        return torch.cat([rows[:n] for rows, n in zip(found, lengths, strict=True)])

    @staticmethod
    def _sum(tensor: Tensor) -> None:
        with _others_may_end():
            dist.all_reduce(tensor)


def _leave() -> None:
    """Close the connections, one process after another.

    In gloo a thread closes a connection that its other end closed. A process was once aborted (SIGABRT) as both ends
    closed at the same moment, all work done; hundreds of trials did not show it again.
    """
    time.sleep(APART_S * dist.get_rank())
    dist.destroy_process_group()


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


@contextmanager
def _others_may_end() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"another process of this training ended or cannot be reached ({str(error).splitlines()[0]}); its own "
            "message says why; --resume goes on from the last checkpoint"
        ) from error


def rows_gradient(rows: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table that is values (n, D) in rows (n,), which may repeat, and zero elsewhere: sparse."""
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 warns where only the call itself says so
        return torch.sparse_coo_tensor(rows[None], values, table.shape)
