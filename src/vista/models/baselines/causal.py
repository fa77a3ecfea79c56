"""What ``sasrec`` and ``hstu`` share: a causal encoder over events, in two forms with the same weights.

    evaluation   each request's own window of R raw events is encoded: what is scored depends on nothing else
    training     the events of a lane are encoded once, each row seeing the R rows up to itself, and every request of
                 the stretch reads the rows it knows (teacher forcing, as both papers train)

Positions and times enter as differences alone, so both forms give the same numbers as long as a history fits into the
window. Beyond that, in the training form a row of the second layer and above has heard of events that are older than
the window, since the rows it reads have seen windows of their own.

Attention goes in blocks of query rows with the keys within reach of them, recomputed for the gradient: n rows cost
n x R in time, and memory for one block.

Shape letters: B lanes or requests, n rows of each, N event rows, Q requests, C candidates, R raw events, D width, H
heads, E head width, F width of something.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vista.models.baselines.base import (
    NUMBERS_KEPT,
    NUMBERS_PER_PIECE,
    Baseline,
    Rows,
    with_absent,
)
from vista.models.batch import Memory, TimelineBatch
from vista.models.embeddings import GAP_BUCKETS
from vista.models.inputs import US_PER_S, Events, ragged_index

BLOCK_ROWS = 256  # query rows at a time
BUCKET_STARTS_US = torch.tensor([0, *(US_PER_S * (2**b - 1) for b in range(1, GAP_BUCKETS - 1))])


@dataclass(frozen=True)
class Stretches:
    """B stretches of events: timestamp_us (B, n), is_there (B, n); a row sees the ``reach`` rows up to itself.

    asked_us (B, n): the time from which a row looks back; None: its own. keeps: intermediates are kept for the gradient
    instead of being made again, and blocks from layer to layer; for stretches whose pairs of rows fit into memory.
    """

    timestamp_us: Tensor
    is_there: Tensor
    reach: int
    asked_us: Tensor | None = None
    keeps: bool = False

    @cached_property
    def kept_blocks(self) -> list[Block]:
        return list(Block.all_of(self))


@dataclass(frozen=True)
class Block:
    """Query rows and the key rows in their reach.

    distance (rows, keys): how many rows back a key is, clamped to 0 .. reach - 1; is_seen (B, 1, rows, keys): whether
    it is there and in reach. A row sees itself even where it is padding, so that a softmax is defined.
    """

    rows: slice
    keys: slice
    distance: Tensor
    is_seen: Tensor
    of: Stretches

    @property
    def time_bucket(self) -> Tensor:
        """(B, rows, keys): the bucket of the time from each key to the moment from which a row looks back."""
        return self._kept_time_bucket if self.of.keeps else self._make_time_bucket()

    @cached_property
    def _kept_time_bucket(self) -> Tensor:
        return self._make_time_bucket()

    def _make_time_bucket(self) -> Tensor:
        asked_us = self.of.timestamp_us if self.of.asked_us is None else self.of.asked_us
        return time_bucket(asked_us[:, self.rows, None] - self.of.timestamp_us[:, None, self.keys])

    @classmethod
    def all_of(cls, of: Stretches, first: int = 0) -> Iterator[Block]:
        """Blocks that hold rows first .. n - 1."""
        num_rows, device = of.is_there.shape[1], of.is_there.device
        for start in range(first, num_rows, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, num_rows))
            keys = slice(max(0, start - of.reach + 1), rows.stop)
            place = torch.arange(num_rows, device=device)
            distance = place[rows, None] - place[None, keys]
            within = (distance >= 0) & (distance < of.reach)
            is_seen = (within & of.is_there[:, None, keys]) | (distance == 0)
            yield cls(rows, keys, distance.clamp(0, of.reach - 1), is_seen[:, None], of)


def attend_in_blocks(attend: Callable[[Block], Tensor], of: Stretches, first: int = 0) -> Tensor:
    """``attend`` gives (B, H, rows, E) of one block; all of them from row ``first`` on, (B, H, n - first, E)."""
    recomputes = torch.is_grad_enabled() and not of.keeps
    blocks = of.kept_blocks if of.keeps and not first else Block.all_of(of, first)
    return torch.cat(
        [checkpoint(attend, block, use_reentrant=False) if recomputes else attend(block) for block in blocks], 2
    )


def time_bucket(apart_us: Tensor) -> Tensor:
    """What ``gap_bucket`` gives for times of 0 and more, in one pass: this is made for every pair of rows."""
    return torch.bucketize(apart_us, BUCKET_STARTS_US.to(apart_us.device), out_int32=True, right=True)


class CausalBaseline(Baseline):
    """A baseline that encodes events causally. A family says how: ``encode`` and ``read``."""

    @abstractmethod
    def encode(self, x: Tensor, of: Stretches) -> Rows:
        """Event vectors (B, n, D) to what candidates read of each, (B, n, F) each."""

    def project(self, event_x: Tensor) -> Rows:
        return (event_x,)

    def prepare(self, batch: TimelineBatch, memory: Memory) -> tuple[Rows, Memory]:
        if not self.training:
            return super().prepare(batch, memory)
        events = batch.events
        event_x = self.embedding(events.item, events.action, events.timestamp_us, events.gap_us)
        return with_absent(self.encode_lanes(event_x, events)), ()

    def encode_lanes(self, event_x: Tensor, events: Events) -> Rows:
        """Each lane's events as one stretch: event vectors (N, D) to (N, F) each. Lanes of like length go together."""
        lengths = events.lengths()
        order = lengths.argsort(descending=True, stable=True)
        order = order[: max(1, int((lengths > 0).sum()))]
        keeps = self.config.encoder_layers * self._numbers_of_pairs(lengths) <= NUMBERS_KEPT
        encoded, places = [], []
        while len(order):
            width = int(lengths[order[0]])
            numbers = max(1, self.numbers_of_encoding(width))
            at_once = max(1, NUMBERS_PER_PIECE // numbers)
            lanes, order = order[:at_once], order[at_once:]
            index = ragged_index(events.offsets[lanes], lengths[lanes], width)
            is_there, flat = index >= 0, index.clamp(min=0)
            of = Stretches(events.timestamp_us[flat], is_there, self.config.history_events, keeps=keeps)
            encoded.append([rows[is_there] for rows in self.encode(event_x[flat], of)])
            places.append(index[is_there])
        back = torch.cat(places).argsort()
        return tuple(torch.cat(parts)[back] for parts in zip(*encoded, strict=True))

    def numbers_of_encoding(self, num_rows: int) -> int:
        """How many numbers the largest tensors of ``encode`` have together, for one stretch."""
        keys = min(num_rows, self.config.history_events + BLOCK_ROWS)
        return self.config.num_heads * min(num_rows, BLOCK_ROWS) * keys + 4 * self.config.width * num_rows

    def _numbers_of_pairs(self, lengths: Tensor) -> int:
        """Logits of all pairs of rows that blocks make for stretches of these lengths, in one layer."""
        keys = lengths.clamp(max=self.config.history_events + BLOCK_ROWS)
        return self.config.num_heads * int((lengths * keys).sum())
