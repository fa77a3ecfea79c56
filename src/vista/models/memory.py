"""What a history is folded into: the memory of one summarizer layer, behind one seam.

A memory turns each segment's keys and values into a *part*, merges parts in time order into a *running value* (the
carried state, of fixed size), and answers reads. Merging is a function of running value and part alone, so one event
more costs the same whatever came before. Sums are float32; an int8 *residue* beside each holds what rounding has lost,
so that a million events drift no further than ten thousand (`vista.ops.qla.add_compensated`).

    sum     Z = phi(K)^T V; merge: add. The paper's memory; events and seeds read it.
    slots   each seed's softmax over all events, kept as (numerator, denominator, maximum); merge: rescale and add.
            Read through norm, by seeds alone. Their queries are constants, or the softmax would have to be taken again.

To add one: a class with the methods of `Memory`, a line in `make_memory`, and a choice in config.py, from which
tests/models/test_memory.py knows it and holds it to the contract.

Shape letters: B users, G segments, S events in a segment, H heads, E head width, K seeds.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.models.layers import norm, split_heads
from vista.ops.order import SegmentOrder
from vista.ops.qla import merge_sums, read_memory, rms_norm, scan_sums, segment_sums
from vista.ops.slots import EMPTY_MAXIMUM, merge_slots, scan_slots, slot_parts, slot_shares

Running = tuple[Tensor, ...]
SLOT_QUERY_SCALE = 3.0  # of fresh slot queries: spread enough that slots divide the events among themselves at once


class Memory(Protocol):
    """One layer's memory. ``names``: one per tensor of the running value."""

    names: tuple[str, ...]

    def initial(self, num_users: int) -> Running:
        """The running value of an empty history, (B, ...) each: float32, residues int8."""

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        """The parts of segments: k, v (G, H, S, E), is_valid (G, S) to (G, ...) float32 each, without residues."""

    def merge(self, running: Running, part: Running) -> Running:
        """The running value after one more segment."""

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        """``merge`` over the segments of many users: the running value after each (G, ...), and after all (B, ...)."""

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What seeds read: their q, k, v (B, H, K, E), num_events (B,), to (B, H, K, E) and the mass (B, K, H)."""


class SumMemory(nn.Module):
    """phi(K)^T V summed over events; read through norm and outer activation (``vista.ops.qla``)."""

    names = ("sum", "sum_residue")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = config.width // config.num_heads

    def initial(self, num_users: int) -> Running:
        shape = (num_users, self.num_heads, self.head_width, self.head_width)
        return torch.zeros(shape), torch.zeros(shape, dtype=torch.int8)

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        return (segment_sums(k, v, is_valid),)

    def merge(self, running: Running, part: Running) -> Running:
        return merge_sums(running, part)

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        return scan_sums(order, running, parts)

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        # the seeds' own keys and values are added for them alone: events never see seeds
        return read_memory(q, running[0] + segment_sums(k, v), rms_norm), None


class SlotsMemory(nn.Module):
    """One softmax read-out per seed and head over all events, carried as (numerator, denominator, maximum).

    Numerator (E) and denominator (1) are one tensor, since they are always summed together.

    Naive definition, one head:  norm(softmax(query_k . key_n / sqrt(E) over n) @ value).  The norm keeps the direction
    alone: an event that answers the seed does not fade while others come that do not. The *mass*, log(sum of weights) -
    log(number of events), tells beside it how much of the history answered.
    """

    names = ("slot_sums", "slot_maximum", "slot_residue")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_seeds = config.num_heads, config.num_seeds
        self.head_width = config.width // config.num_heads
        self.query = nn.Parameter(SLOT_QUERY_SCALE * torch.randn(self.num_heads, self.num_seeds, self.head_width))

    def initial(self, num_users: int) -> Running:
        shape = (num_users, self.num_heads, self.num_seeds)
        wide = (*shape, self.head_width + 1)
        return torch.zeros(wide), torch.full(shape, EMPTY_MAXIMUM), torch.zeros(wide, dtype=torch.int8)

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        return slot_parts(self.query, k, v, is_valid)

    def merge(self, running: Running, part: Running) -> Running:
        return merge_slots(running, part)

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        return scan_slots(order, running, parts)

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        sums, maximum, _ = running
        numerator, denominator = sums[..., :-1], sums[..., -1]
        is_empty = denominator <= 0
        safe = denominator.masked_fill(is_empty, 1.0)
        log_count = num_events.clamp(min=1).to(denominator.dtype).log()[:, None, None]
        mass = (maximum + safe.log() - log_count).masked_fill(is_empty, 0.0)
        return norm(numerator).to(v.dtype), mass.transpose(1, 2)

    def shares(self, k: Tensor, running: Running) -> Tensor:
        """What share of each slot of one user each event has: k (G, H, S, E), running (1, ...), to (G, H, K, S).

        Over all events that ``running`` holds they add up to 1.
        """
        return slot_shares(self.query, k, running[0], running[1])


def make_memory(config: ModelConfig) -> SumMemory | SlotsMemory:
    match config.memory:
        case "sum":
            return SumMemory(config)
        case "slots":
            return SlotsMemory(config)
        case _:
            raise AssertionError(config.memory)


def project_heads(linear: nn.Linear, x: Tensor, num_heads: int) -> Tensor:
    """(..., rows, D) to (..., H, rows, E)."""
    return split_heads(linear(x), num_heads)
