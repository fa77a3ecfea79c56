"""What a history is folded into: the memory of one summarizer layer, behind one seam.

A memory turns each segment's keys and values into a *part*, merges parts in time order into a *running value* (the
carried state, of fixed size), and answers reads. Merging is a function of running value and part alone, so one event
more costs the same whatever came before. Float32 sums have an int8 *residue* beside them that holds what rounding has
lost, so that a million events drift no further than ten thousand (`vista.ops.qla.add_compensated`).

    sum     Z = phi(K)^T V; merge: add. The paper's memory; events and seeds read it.
    slots   each seed's softmax over all events, kept as (numerator, denominator, maximum); merge: rescale and add.
            Read through norm, by seeds alone. Their queries are constants, or the softmax would have to be taken again.
    ridge   G = sum of k k^T and M = sum of k v^T, float64; merge: add. Read by solving (`vista.ops.ridge`).
    delta   the gated delta rule, float64; merge: the affine map of the segment (`vista.ops.delta`). Order matters.

All but slots can be asked by anybody, a candidate as well: what they remember becomes a *read-out*, one matrix per head
that a query is multiplied with, so an answer costs the same however long the history is.

To add one: a class with the methods of `AskableMemory`, or `Memory` alone, a line in `ASKABLE` or `make_memory`, and
the choices in config.py, from which tests/models/test_memory.py knows it and holds it to the contract.

Shape letters: B users, G segments, S events in a segment, H heads, E head width, K seeds.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from vista.config import ModelConfig
from vista.models.layers import norm, split_heads
from vista.ops.delta import ask_delta, delta_parts, merge_delta
from vista.ops.order import SegmentOrder
from vista.ops.qla import merge_sums, read_memory, rms_norm, scan_sums, segment_sums
from vista.ops.ridge import ask_ridge, ridge_parts, ridge_readout
from vista.ops.slots import EMPTY_MAXIMUM, merge_slots, scan_slots, slot_parts, slot_shares

Running = tuple[Tensor, ...]
SLOT_QUERY_SCALE = 3.0  # of fresh slot queries: spread enough that slots divide the events among themselves at once
FRESH_STRENGTH, LEAST_STRENGTH = 1.0, 1e-4  # of ridge, in events: fresh, and what training cannot go below
FRESH_FORGETTING = -9.0  # logit of the share of all that one event makes delta forget: half in 5,600 events


class Memory(Protocol):
    """One layer's memory."""

    @property
    def names(self) -> tuple[str, ...]:
        """One per tensor of the running value."""

    @property
    def has_mass(self) -> bool:
        """Whether a read comes with a mass: how much of the history answered."""

    def initial(self, num_users: int) -> Running:
        """The running value of an empty history, (B, ...) each: float32 or float64, residues int8."""

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        """The parts of segments: k, v (G, H, S, E), is_valid (G, S) to (G, ...) each, without residues."""

    def merge(self, running: Running, part: Running) -> Running:
        """The running value after one more segment."""

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        """``merge`` over the segments of many users: the running value after each (G, ...), and after all (B, ...)."""

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What seeds read: their q, k, v (B, H, K, E), num_events (B,), to (B, H, K, E) and the mass (B, K, H)."""


class AskableMemory(Memory, Protocol):
    """A memory that answers anybody's questions, in two steps, since the first does not depend on who asks."""

    def readout(self, running: Running) -> Tensor:
        """What questions are multiplied with, (B, H, E, columns): of a running value (B, ...)."""

    @staticmethod
    def ask(readout: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """What queries (B, H, rows, E) read, (B, H, rows, E), and the mass (B, rows, H) where the memory has one."""


class SumMemory(nn.Module):
    """phi(K)^T V summed over events; read through norm and outer activation (``vista.ops.qla``)."""

    names = ("sum", "sum_residue")
    has_mass = False

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

    def readout(self, running: Running) -> Tensor:
        return silu(rms_norm(running[0]))

    @staticmethod
    def ask(readout: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        return silu(q) @ readout.to(q.dtype), None


class SlotsMemory(nn.Module):
    """One softmax read-out per seed and head over all events, carried as (numerator, denominator, maximum).

    Numerator (E) and denominator (1) are one tensor, since they are always summed together.

    Naive definition, one head:  norm(softmax(query_k . key_n / sqrt(E) over n) @ value).  The norm keeps the direction
    alone: an event that answers the seed does not fade while others come that do not. The *mass*, log(sum of weights) -
    log(number of events), tells beside it how much of the history answered.
    """

    names = ("slot_sums", "slot_maximum", "slot_residue")
    has_mass = True

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


class RidgeMemory(nn.Module):
    """The linear map from keys to values that fits all events best; its strength, per head, is learned.

    Naive definition: ``vista.ops.ridge.ridge_read_naive``. Mass: log(1 / leverage), how many events had a key like the
    query's.
    """

    names = ("gram_and_moment",)
    has_mass = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = config.width // config.num_heads
        self.log_strength = nn.Parameter(torch.full((config.num_heads,), FRESH_STRENGTH).log())

    def initial(self, num_users: int) -> Running:
        return (torch.zeros(num_users, self.num_heads, self.head_width, 2 * self.head_width, dtype=torch.float64),)

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        return (ridge_parts(k, v, is_valid),)

    def merge(self, running: Running, part: Running) -> Running:
        return (running[0] + part[0],)

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        return order.scan(self.merge, running, parts)

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.ask(self.readout(running), q)

    def readout(self, running: Running) -> Tensor:
        return ridge_readout(running[0], self.log_strength.exp() + LEAST_STRENGTH)

    @staticmethod
    def ask(readout: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        read, mass = ask_ridge(readout, q)
        return read, mass.transpose(-2, -1)


class DeltaMemory(nn.Module):
    """The gated delta rule; each event's own key and value say how far it corrects and how much is forgotten.

    Naive definition: ``vista.ops.delta.delta_naive``.
    """

    names = ("delta",)
    has_mass = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = config.width // config.num_heads
        self.gate = nn.Parameter(torch.zeros(config.num_heads, 2 * self.head_width, 2))
        self.gate_bias = nn.Parameter(torch.tensor([0.0, FRESH_FORGETTING]).repeat(config.num_heads, 1, 1))

    def initial(self, num_users: int) -> Running:
        return (torch.zeros(num_users, self.num_heads, self.head_width, self.head_width, dtype=torch.float64),)

    def parts(self, k: Tensor, v: Tensor, is_valid: Tensor) -> Running:
        step, forgetting = (torch.cat([k, v], -1) @ self.gate.to(k.dtype) + self.gate_bias).unbind(-1)
        return delta_parts(k, v, step.sigmoid(), logsigmoid(-forgetting), is_valid)

    def merge(self, running: Running, part: Running) -> Running:
        return (merge_delta(running[0], (part[0], part[1])),)

    def scan(self, order: SegmentOrder, running: Running, parts: Running) -> tuple[Running, Running]:
        return order.scan(self.merge, running, parts)

    def read(
        self, running: Running, q: Tensor, k: Tensor, v: Tensor, num_events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.ask(running[0], q)

    def readout(self, running: Running) -> Tensor:
        return running[0]

    @staticmethod
    def ask(readout: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        return ask_delta(readout, q), None


ASKABLE: dict[str, type[SumMemory | RidgeMemory | DeltaMemory]] = {
    "sum": SumMemory,
    "ridge": RidgeMemory,
    "delta": DeltaMemory,
}


def make_memory(config: ModelConfig) -> Memory:
    """What the seeds read."""
    return SlotsMemory(config) if config.memory == "slots" else ASKABLE[config.memory](config)


def project_heads(linear: nn.Linear, x: Tensor, num_heads: int) -> Tensor:
    """(..., rows, D) to (..., H, rows, E)."""
    return split_heads(linear(x), num_heads)
