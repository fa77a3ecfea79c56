"""The item table shared out over the processes that train together: each holds, and updates, every n-th row.

A process asks the others for the rows that its lanes of a step read, once before the step, and sends their gradients
back, once after it. Who holds a row updates it with the sum, so that the step is that of one process but for rounding.
Where no gradient is wanted, each look-up asks by itself, and whoever has nothing left to look up answers the others
until all are done (``finish``).

Shape letters: V rows of the whole table, U rows asked for, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from vista.catalogue import Catalogue
from vista.checkpoint import InParts, ModelSchema, build_model
from vista.config import Config
from vista.errors import ConfigError
from vista.models.batch import TimelineBatch
from vista.models.embeddings import ITEM_SCALE, ItemEmbedding, ItemTables
from vista.models.model import Model
from vista.training.processes import Processes, rows_gradient

ROWS_AT_ONCE = 16_384  # of each process, when a table is written: some MB, whatever the table
OPTIMIZER_STATES = ("optimizer.1.0.exp_avg", "optimizer.1.0.exp_avg_sq")  # of each row, as a checkpoint calls them


class ShardedRows(nn.Embedding):
    """Rows rank, rank + n, rank + 2 n, ... of a table of V rows, behind the interface of the whole table.

    row_of (I,) int64: the row of each item index.
    """

    def __init__(self, row_of: Tensor, num_rows: int, width: int, processes: Processes, seed: int) -> None:
        super().__init__(len(range(processes.rank, num_rows, processes.number)), width, sparse=True)
        self.row_of, self.num_rows, self.processes = row_of, num_rows, processes
        self.asked = torch.zeros(0, dtype=torch.int64)  # the place here of all rows asked for
        self.sizes: tuple[list[int], list[int]] = ([], [])  # of the pieces sent to and got from each process
        self.order = self.rows = self.asked
        self.values: Tensor | None = None  # (U, D) of the step under way, where its gradient gathers
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.weight, std=ITEM_SCALE, generator=generator)

    def forward(self, row: Tensor) -> Tensor:
        if self.values is None:
            rows, place = row.unique(return_inverse=True)
            return self._ask(rows)[0][place]
        return embedding(torch.searchsorted(self.rows, row), self.values)

    def fetch(self, batches: list[TimelineBatch]) -> None:
        """Ask for the rows of a step's batches. All processes call it together, those without lanes with none."""
        items = [item for batch in batches for item in _items_of(batch)]
        self.rows = self.row_of[torch.cat([torch.zeros(1, dtype=torch.int64), *items])].unique()
        self.values = self._ask(self.rows)[0].requires_grad_()

    def push(self) -> None:
        """Send the gradients of what was fetched to whoever holds the rows. All processes call it together."""
        assert self.values is not None
        gradient = torch.zeros_like(self.values) if self.values.grad is None else self.values.grad
        sent, got = self.sizes
        values = self.processes.exchange(gradient[self.order], sent, got)
        self.weight.grad = rows_gradient(self.asked, values, self.weight)
        self.values = None

    def finish(self) -> None:
        """Answer the others until nobody looks anything up any more. All processes call it together."""
        while self._ask(torch.zeros(0, dtype=torch.int64), is_done=True)[1]:
            pass

    def whole(self, mine: Tensor) -> InParts:
        """A tensor (V, ...) of the whole table from each process's rows of it, as the first process can write it.

        All processes go through its parts together; those of the others are empty.
        """
        return InParts((self.num_rows, *mine.shape[1:]), mine.dtype, self._parts(mine))

    def _parts(self, mine: Tensor) -> Iterator[Tensor]:
        number = self.processes.number
        for start in range(0, -(-self.num_rows // number), ROWS_AT_ONCE):
            own = slice(start, start + ROWS_AT_ONCE)
            lengths = [len(range(rank, self.num_rows, number)[own]) for rank in range(number)]
            part = mine.new_empty(sum(lengths), *mine.shape[1:])
            pieces = self.processes.to_first(mine[own], lengths)
            for rank, piece in enumerate(pieces or []):
                part[rank::number] = piece
            yield part[: len(part) if pieces else 0]

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor (V, ...)."""
        return whole[self.processes.rank :: self.processes.number].clone()

    @torch.no_grad()
    def _ask(self, rows: Tensor, is_done: bool = False) -> tuple[Tensor, bool]:
        """The values (U, D) of rows (U,), and whether any process is not done."""
        number = self.processes.number
        owner = rows % number
        self.order = owner.argsort(stable=True)
        sent = owner.bincount(minlength=number)
        message = torch.stack([sent, torch.full_like(sent, not is_done)], 1)
        answer = self.processes.exchange(message, [1] * number, [1] * number)
        self.sizes = (sent.tolist(), answer[:, 0].tolist())
        self.asked = self.processes.exchange(rows[self.order] // number, *self.sizes)
        values = self.processes.exchange(self.weight[self.asked], *reversed(self.sizes))
        return values[self.order.argsort()], bool(answer[:, 1].any())


def build_sharded(config: Config, schema: ModelSchema, catalogue: Catalogue, processes: Processes) -> Model:
    """A fresh model whose item table is shared out; nobody ever holds all of it.

    Raises ConfigError with one process, and for a model without an item table.
    """
    if processes.number == 1:
        raise ConfigError(
            "--shard-items shares the item table out over processes, and there is one: start it with torchrun "
            "--nproc-per-node N -m vista.cli.main train ..."
        )
    tables = replace(ItemTables.of(catalogue), num_rows=1)
    model = build_model(config.model, schema, catalogue, tables)
    items = [module for module in model.modules() if isinstance(module, ItemEmbedding)]
    if not items:
        raise ConfigError(f"--shard-items: model {config.model.model!r} has no item table")
    seed = config.train.seed * processes.number + processes.rank
    items[0].rows = ShardedRows(tables.embedding_row, catalogue.num_rows, config.model.width, processes, seed)
    return model


def shards_of(model: nn.Module) -> tuple[ShardedRows | None, set[str]]:
    """The sharded table of a model, and what its tensors are called: in the model, and in a checkpoint."""
    found = [(f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, ShardedRows)]
    if not found:
        return None, set()
    name, rows = found[0]
    return rows, {name, f"model.{name}", f"average.{name}", *OPTIMIZER_STATES}


def _items_of(batch: TimelineBatch) -> list[Tensor]:
    """Every item index that a batch names, (n,) each."""
    of_windows = [] if batch.windows is None else [batch.windows.events.item]
    named = [batch.events.item, batch.requests.candidate, batch.requests.recent_item, *of_windows]
    return [item.flatten() for item in named]
