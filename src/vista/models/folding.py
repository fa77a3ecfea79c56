"""Closed segments folded without gradients on a CPU: where bulk runs and streams spend their time.

The definition is `Summarizer.fold`, which training runs; here the same sums are made in fewer passes over memory
(tests/models/test_folding.py holds one to the other):

- *Tiles.* A tile is some segments of some users, about TILE_ROWS events in all, whatever the lengths: its rows stay in
  the cache through all layers, and its buffers are used again.
- *No masks.* A closed segment is full.
- *What is read, alone.* Only events that attend to earlier segments need the memory after each segment; any other
  memory takes in a tile at once.
- *Products in another order.* phi(Q) M W_o is phi(Q) (M W_o): the product in brackets is small, and what is left is one
  dense product that adds to the rows.
- *Every product writes D columns*, into rows of their own: what is written is still in the cache when it is read again.
- *Sums in float64 within a call*: one addition per tile, in place of a compensated one per segment, and no less exact.

Shape letters: B users, U users and n segments of each in a tile, G = U n, S events in a segment, R = G S rows of a
tile, H heads, E head width, K seeds, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention, silu

from vista.models.batch import LayerMemory, flatten, unflatten
from vista.models.embeddings import EventEmbedding
from vista.models.inputs import Events
from vista.models.layers import GatedUnit, join_heads
from vista.models.memory import Running, SlotsMemory, SumMemory
from vista.ops.qla import narrowed, rms_norm, widened
from vista.ops.slots import fold_into_slots

if TYPE_CHECKING:
    from vista.models.summarizer import SummarizerLayer

TILE_ROWS = 2_048  # events of a tile, at width 128 a megabyte a tensor: half of it and twice were slower


@dataclass(frozen=True)
class Tile:
    """Segments first .. first + num_segments - 1 of some users: users (U,), first (U,) int64."""

    users: Tensor
    first: Tensor
    num_segments: int


def tiles(closed: Tensor, most: int) -> Iterator[Tile]:
    """Tiles of ``most`` segments, a power of two, or nearly, that hold closed[b] segments of user b in time order.

    First each user's full tiles; what is left of all users is cut into halves, quarters and so on, of several users
    together, so that every tile is one dense block.
    """
    for user in (closed >= most).nonzero().flatten().tolist():
        one = torch.tensor([user])
        for first in range(0, int(closed[user]) // most * most, most):
            yield Tile(one, torch.tensor([first]), most)
    size = most // 2
    while size:
        users = (closed & size).nonzero().flatten()
        for part in users.split(most // size) if len(users) else ():
            yield Tile(part, closed[part] // (2 * size) * (2 * size), size)
        size //= 2


def can_fold(layers: Sequence[SummarizerLayer], like: Tensor) -> bool:
    """Whether `fold_closed` gives what the definition gives: no gradient is asked for, and all is on a CPU."""
    return (
        not torch.is_grad_enabled()
        and like.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(type(memory) in (SumMemory, SlotsMemory) for layer in layers for memory in layer.memories)
    )


def fold_closed(
    layers: Sequence[SummarizerLayer],
    embedding: EventEmbedding,
    memory: Sequence[LayerMemory],
    pending: Events,
    closed: Tensor,
) -> tuple[LayerMemory, ...]:
    """The layers' memory (B, ...) after closed[b] segments of each user's pending events. closed (B,) int64.

    The memory of users without a closed segment stays as it is, bit for bit.
    """
    touched = closed.nonzero().flatten()
    if not len(touched):
        return tuple(memory)
    size = layers[0].config.segment_events
    buffers = Buffers(embedding.gap.weight)
    folds = [LayerFold(layer, [tuple(t[touched] for t in running) for running in before], buffers)
             for layer, before in zip(layers, memory, strict=True)]  # fmt: skip
    most = 1 << max(TILE_ROWS // size, 1).bit_length() - 1  # a power of two
    table, side = embedding.side_table(), embedding.side_rows(pending)
    starts = pending.offsets[:-1][touched]
    for tile in tiles(closed[touched], most):
        rows = _rows(starts[tile.users] + tile.first * size, tile.num_segments * size)
        x = embedding.items(pending.item[rows]).add_(embedding_bag(side[rows], table, mode="sum"))
        for fold in folds:
            fold(x, tile)
    tensors = [t.clone() for t in flatten(tuple(memory))]
    after = flatten(tuple(fold.memory() for fold in folds))
    return unflatten([t.index_copy_(0, touched, new) for t, new in zip(tensors, after, strict=True)], tuple(memory))


def _rows(starts: Tensor, length: int) -> Tensor | slice:
    """Rows starts[u] .. starts[u] + length - 1 for each u, one after another."""
    if len(starts) == 1:
        return slice(int(starts[0]), int(starts[0]) + length)
    return (starts[:, None] + torch.arange(length)).flatten()


class Buffers:
    """Memory for the rows of a tile, the same from tile to tile and from layer to layer."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """(rows, width), what was there before still in it."""
        numbers = rows * width
        if name not in self.kept or len(self.kept[name]) < numbers:
            self.kept[name] = self.like.new_empty(numbers)
        return self.kept[name][:numbers].view(rows, width)


class LayerFold:
    """One layer's weights laid out for tiles, and the running values of its memories, for one call."""

    def __init__(self, layer: SummarizerLayer, memory: Sequence[Running], buffers: Buffers) -> None:
        config = layer.config
        self.width, self.num_heads, self.size = config.width, config.num_heads, config.segment_events
        self.layer, self.mixer = layer, layer.mixer
        self.before = [tuple(running) for running in memory]
        self.wide = [_widened(running) for running in memory]
        projections = {"k": layer.key, "v": layer.value}
        if layer.mixes_events and layer.query:
            projections["q"] = layer.query
        self.into = {name: linear.weight.t().contiguous() for name, linear in projections.items()}  # (D, D) each
        self.out = layer.out.weight.t().unflatten(0, (self.num_heads, -1)).contiguous()  # (H, E, D)
        self.unit = _unit_parts(layer.unit) if layer.mixes_events else []
        self.buffers = buffers

    def __call__(self, x: Tensor, tile: Tile) -> None:
        """Rows x (R, D) of a tile: taken into the memories, and changed in place to what the next layer reads."""
        num_users = len(tile.users)
        normed = self._normed(x)
        k, v, *q = (
            torch.mm(normed, weight, out=self.buffers.take(name, len(x), self.width)).unflatten(0, (num_users, -1))
            for name, weight in self.into.items()
        )  # (U, n S, D) each
        for wide, memory in zip(self.wide, self.layer.memories, strict=True):
            mine = [t[tile.users] for t in wide] if num_users > 1 else [t.narrow(0, int(tile.users), 1) for t in wide]
            if isinstance(memory, SlotsMemory):
                fold_into_slots(memory.query, self._heads(k), self._heads(v), mine[0], mine[1])
            elif memory is self.mixer:
                self._mix(x, k, v, q[0], mine[0], tile.num_segments)
            else:
                mine[0] += silu(self._heads(k)).transpose(-2, -1) @ self._heads(v)
            if num_users > 1:
                for tensor, rows in zip(wide, mine, strict=True):
                    tensor.index_copy_(0, tile.users, rows)
        if not self.layer.mixes_events:
            return
        if self.mixer is None:
            self._attend(x, k, v, q[0])
        self._add_unit(x)

    def memory(self) -> LayerMemory:
        """The running values, as they are carried between calls."""
        return tuple(_narrowed(wide, before) for wide, before in zip(self.wide, self.before, strict=True))

    def _mix(self, x: Tensor, k: Tensor, v: Tensor, q: Tensor, total: Tensor, num_segments: int) -> None:
        """x += phi(Q) phi(norm(M)) W_o with M after each segment; total (U, H, E, E) is M, brought up to the last."""
        shape = (-1, self.size, self.num_heads, total.shape[-1])
        phi_k, v = silu(k, inplace=True).view(shape), v.view(shape)  # nobody reads k any more: the reader went before
        z = x.new_empty(self.num_heads, len(v), *total.shape[-2:])  # (H, G, E, E)
        for head, of_head in enumerate(z):
            torch.bmm(phi_k[:, :, head].transpose(1, 2), v[:, :, head], out=of_head)
        after = z.unflatten(1, (-1, num_segments)).to(_carried(z)).cumsum(2).transpose(0, 1)  # (U, H, n, E, E)
        last = after[:, :, -1].clone()
        after += total.to(after.dtype)[:, :, None]
        total += last
        factor = silu(rms_norm(after), inplace=True).to(x.dtype).transpose(0, 1).flatten(1, 3)  # (H, G E, E)
        read = (factor @ self.out).unflatten(1, (-1, total.shape[-2])).transpose(0, 1)  # (G, H, E, D)
        phi_q = silu(q, inplace=True).view(-1, self.size, self.width)
        x.unflatten(0, (-1, self.size)).baddbmm_(phi_q, read.flatten(1, 2))

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, q: Tensor) -> None:
        """x += softmax attention of events within their segment."""
        q, k, v = (self._heads(t.unflatten(1, (-1, self.size)).flatten(0, 1)) for t in (q, k, v))
        x.addmm_(join_heads(scaled_dot_product_attention(q, k, v)).flatten(0, 1), self.out.flatten(0, 1))

    def _add_unit(self, x: Tensor) -> None:
        normed = self._normed(x)
        value, gate = (self.buffers.take(name, len(x), self.width) for name in ("value", "gate"))
        for to_value, to_gate, out in self.unit:
            torch.mm(normed, to_value, out=value)
            x.addmm_(value.mul_(torch.mm(normed, to_gate, out=gate)), out)

    def _normed(self, x: Tensor) -> Tensor:
        """What `layers.norm` gives, which makes a tensor of squares on the way."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_carried(x))
        scale = torch.addcmul(
            length.new_tensor(torch.finfo(x.dtype).eps), length, length, value=1 / self.width
        ).rsqrt_()
        return torch.mul(x, scale.to(x.dtype), out=self.buffers.take("normed", len(x), self.width))

    def _heads(self, x: Tensor) -> Tensor:
        """(U, rows, D) to (U, H, rows, E)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _unit_parts(unit: GatedUnit) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The gated unit as a sum of narrower ones, D columns each: weights (D, D) of value, gate and output."""
    size = unit.out.weight.shape[0]
    value, gate = (half.split(size) for half in unit.value_and_gate.weight.chunk(2))
    out = unit.out.weight.split(size, 1)
    return [tuple(w.t().contiguous() for w in part) for part in zip(value, gate, out, strict=True)]


def _carried(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(running: Running) -> Running:
    """A running value (sum, ..., residue) with its sum as float64, without the residue."""
    total, *others, residue = running
    return widened(total, residue), *(t.clone() for t in others)


def _narrowed(wide: Running, before: Running) -> Running:
    """The reverse, in the types of ``before``."""
    total, residue = narrowed(wide[0], before[0].dtype)
    return total, *wide[1:], residue
