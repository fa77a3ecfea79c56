"""Folding long stretches, and reading many borders, with gradients in little memory: activation checkpointing by block.

What is kept of a block for its gradient is its events' vectors and the memory before it, both small; all else is
computed again when the gradient comes to it. Memory is handed from block to block, as from one call to the next, so
that the numbers are those of folding at once.

Shape letters: B users, G segments, M borders, K summary tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vista.models.batch import Memory, flatten, unflatten
from vista.models.inputs import Progress
from vista.ops.order import SegmentOrder

if TYPE_CHECKING:
    from vista.models.summarizer import Segments

KEPT_ROWS = 32_768  # events folded, or tokens read, with all activations kept: at width 128 some 0.5 GB a layer
BLOCK_ROWS = 8_192  # of a block, where they are not: what is made again at a time

Fold = Callable[["Segments", SegmentOrder, Memory], tuple[Memory, Memory]]


Read = Callable[[Memory, Progress], Tensor]


def must_recompute(num_rows: int) -> bool:
    """Whether the activations of so many rows are too many to keep."""
    return torch.is_grad_enabled() and num_rows > KEPT_ROWS


def fold_in_blocks(fold: Fold, segments: Segments, order: SegmentOrder, memory: Memory) -> tuple[Memory, Memory]:
    """What ``fold`` gives of all segments: the memory after each (G, ...), and after all (B, ...)."""
    after, rows = [], []
    for chosen, block_order in _blocks(order, segments.is_valid.shape[1]):
        block = segments.rows(chosen.to(segments.x.device))
        of_block, memory = checkpoint(fold, block, block_order, memory, use_reentrant=False, preserve_rng_state=False)
        after.append(flatten(of_block))
        rows.append(chosen)
    place = torch.argsort(torch.cat(rows)).to(segments.x.device)
    return unflatten([torch.cat(tensors)[place] for tensors in zip(*after, strict=True)], memory), memory


def read_in_blocks(read: Read, memory: Memory, progress: Progress, num_tokens: int) -> Tensor:
    """What ``read`` gives of M memories, (M, K, D); num_tokens: K."""
    at_once, tokens = max(1, BLOCK_ROWS // num_tokens), []
    for start in range(0, len(progress.num_events), at_once):
        block = slice(start, start + at_once)
        of_block = unflatten([t[block] for t in flatten(memory)], memory)
        columns = Progress(*(getattr(progress, f.name)[block] for f in fields(progress)))
        tokens.append(checkpoint(read, of_block, columns, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(tokens)


def _blocks(order: SegmentOrder, size: int) -> Iterator[tuple[Tensor, SegmentOrder]]:
    """In time order: the rows of a block's segments, of all users who have any left, and their order."""
    start, longest = 0, int(order.num_segments.max())
    while start < longest:
        num_active = int((order.num_segments > start).sum())
        at_once = max(1, BLOCK_ROWS // (size * num_active))
        is_in = (order.ordinal >= start) & (order.ordinal < start + at_once)
        yield is_in.nonzero().squeeze(1), SegmentOrder.of((order.num_segments - start).clamp(0, at_once))
        start += at_once
