"""What the baselines share: events as vectors, the raw events of each request, pieces that fit into memory, the head.

A baseline reads the newest ``history_events`` events before each request. Event vectors, and all projections of them,
are made once per batch, since requests of one user share most events; what depends on both the event and the candidate
is made in pieces of requests, small enough for a processor's cache. Requests of a piece lie close together, so that a
model can read the events of all of them as one stretch (``Window``). Where training would have to keep more than a
bounded amount, pieces are computed again on the way back, so that the peak does not grow with requests x candidates x
events.

Of ours, in all of them: event and item vectors (tied, with categories, actions and time), the head, and that a
candidate's own item counts as such among the events (``same_item``), as it does in our ranker. So that a comparison
shows how the history is read, and nothing else.

Shape letters: N event rows, Q requests, C candidates, R raw events, W events of a window, T tasks, D width, H heads, E
head width, F width of something.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from vista.config import ModelConfig
from vista.models.batch import Memory, Requests, TimelineBatch
from vista.models.embeddings import (
    GAP_BUCKETS,
    ContextEncoder,
    EventEmbedding,
    ItemEmbedding,
    ItemTables,
    gap_bucket,
)
from vista.models.head import Head
from vista.models.layers import norm, small_lookup
from vista.models.model import Model
from vista.models.ranker import POSITION_BUCKETS, SAME_ITEM_LOGIT
from vista.schema import ContextColumn

NUMBERS_PER_PIECE = 2**20  # of a piece's largest intermediates: 4 MiB in float32, so that they stay in a cache
NUMBERS_KEPT = 2**25  # of all pieces' for the gradient: 128 MiB, some five times that in all; beyond, made again
MIN_SPREAD = 64  # events by which windows of one piece may lie apart, or a quarter of a window where that is more

Rows = tuple[Tensor, ...]  # (N + 1, F) each: one row per event, and a row of zeros for those that are absent
Read = Callable[[Rows, Requests, Tensor], Tensor]


class Baseline(Model):
    """A model that reads raw events. A family says how: ``read_width``, ``project``, ``read`` and ``numbers``."""

    read_width: int  # of what a candidate has read

    def __init__(
        self,
        config: ModelConfig,
        tables: ItemTables,
        num_actions: int,
        num_tasks: int,
        context: tuple[ContextColumn, ...],
        num_counts: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.num_tasks = config, num_tasks
        self.embedding = EventEmbedding(ItemEmbedding(tables, config.width), num_actions, config.width)
        self.build()
        self.head = Head(config, ContextEncoder(context), self.read_width, num_tasks, num_counts)

    @abstractmethod
    def build(self) -> None:
        """Make the family's own weights and set ``read_width``."""

    @abstractmethod
    def project(self, event_x: Tensor) -> Rows:
        """What candidates may read of each event, (N, F) each, from event vectors (N, D)."""

    @abstractmethod
    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        """What each candidate reads of its request's events, (Q, C, read_width)."""

    @abstractmethod
    def numbers(self, num_candidates: int, num_events: int) -> int:
        """How many numbers the largest tensors of ``read`` have together, for one request."""

    def prepare(self, batch: TimelineBatch, memory: Memory) -> tuple[Rows, Memory]:
        events = batch.events
        event_x = self.embedding(events.item, events.action, events.timestamp_us, events.gap_us)
        return with_absent(self.project(event_x)), ()

    def rank(self, prepared: Rows, requests: Requests) -> Tensor:
        candidate_x = self.embedding.items(requests.candidate)
        read = self.by_pieces(self.read, prepared, requests, candidate_x)
        return self.head(read, candidate_x, requests)

    def by_pieces(
        self, read: Read, rows: Rows, requests: Requests, candidate_x: Tensor, numbers: int | None = None
    ) -> Tensor:
        """``read`` for any number of requests, in pieces of a bounded size, recomputed for the gradient if need be.

        numbers: what ``read`` makes for one request, where that is not ``self.numbers``.
        """
        numbers = max(1, numbers or self.numbers(candidate_x.shape[1], requests.recent.shape[1]))
        pieces = list(in_pieces(requests, candidate_x, numbers))
        if torch.is_grad_enabled() and numbers * len(candidate_x) > NUMBERS_KEPT:
            read = partial(checkpoint, read, use_reentrant=False)
        return torch.cat([torch.cat([read(rows, part, x) for part, x in piece], 1) for piece in pieces])


def in_pieces(requests: Requests, candidate_x: Tensor, numbers: int) -> Iterator[list[tuple[Requests, Tensor]]]:
    """Pieces of requests, oldest events that all of a piece lack cut off; one request's candidates parted if need be.

    numbers: what one request takes. A piece is a list of its parts, side by side in the candidates.
    """
    num_parts = -(-numbers // NUMBERS_PER_PIECE)
    columns = max(1, -(-candidate_x.shape[1] // num_parts))
    for rows in close_together(requests, max(1, NUMBERS_PER_PIECE // numbers)):
        piece = requests.rows(rows)
        known = (piece.recent >= 0).sum(1).tolist()
        piece = piece.newest(max([1, *known]))
        yield [
            (piece.candidates(slice(start, start + columns)), candidate_x[rows, start : start + columns])
            for start in range(0, max(1, candidate_x.shape[1]), columns)
        ]


def close_together(requests: Requests, at_most: int) -> Iterator[slice]:
    """Requests that follow one another, ``at_most`` together, and whose newest events lie close in the batch."""
    size = requests.recent.shape[1]
    newest = requests.recent[:, -1].tolist() if size else [-1] * len(requests.recent)
    first, low, high, spread = 0, newest[0] if newest else 0, -1, max(MIN_SPREAD, size // 4)
    for row, place in enumerate(newest):
        low, high = min(low, place), max(high, place)
        if row > first and (row - first == at_most or high - low > spread):
            yield slice(first, row)
            first, low, high = row, place, place
    yield slice(first, len(newest))  # no request at all: one empty piece


@dataclass(frozen=True)
class Window:
    """The raw events of some requests, which mostly are the same ones, as one stretch of W rows of the batch's events.

    rows: the stretch; is_there (Q, W): whether a request knows the event; place (Q, W): 1 for the newest one it knows,
    2 for the one before, 0 or less for later ones; item (Q, W) and age_us (Q, W): of the events that are there.
    """

    rows: slice
    is_there: Tensor
    place: Tensor
    item: Tensor
    age_us: Tensor

    @classmethod
    def of(cls, requests: Requests) -> Window:
        """Of requests with at least one column of raw events."""
        recent, size = requests.recent, requests.recent.shape[1]
        is_event, newest = recent >= 0, recent[:, -1:]
        if not is_event.any():
            nothing = torch.zeros_like(newest)
            return cls(slice(0, 1), nothing > 0, nothing, nothing, nothing)
        first, last = int(recent[is_event].min()), int(recent.max())
        place = 1 + newest - torch.arange(first, last + 1, device=recent.device)
        is_there = (place > 0) & (place <= is_event.sum(1, keepdim=True))
        column = (size - place).clamp(0, size - 1)
        return cls(
            slice(first, last + 1),
            is_there,
            place,
            requests.recent_item.gather(1, column) * is_there,
            (requests.timestamp_us[:, None] - requests.recent_us.gather(1, column)).clamp(min=0) * is_there,
        )

    @classmethod
    def own(cls, requests: Requests) -> Window:
        """Each request's own columns instead of one stretch: ``rows`` are then those of (Q, R, F), all of them."""
        size = requests.recent.shape[1]
        place = torch.arange(size, 0, -1, device=requests.recent.device).expand_as(requests.recent)
        age_us = (requests.timestamp_us[:, None] - requests.recent_us).clamp(min=0)
        return cls(slice(0, size), requests.recent >= 0, place, requests.recent_item, age_us)

    def is_same_item(self, requests: Requests) -> Tensor:
        """(Q, C, W) bool: whether an event is of the candidate's own item."""
        return (requests.candidate[:, :, None] == self.item[:, None, :]) & self.is_there[:, None]

    @cached_property
    def age_bucket(self) -> Tensor:
        """(Q, W): the bucket of the time from each event to the request."""
        return gap_bucket(self.age_us)

    @property
    def place_bucket(self) -> Tensor:
        """(Q, W): floor(log2(place))."""
        return self.place.clamp(min=1).float().log2().floor().long()

    def only(self, is_wanted: Tensor, size: int) -> Tensor:
        """Of the events wanted (Q, C, W) that are there, the newest ``size``: (Q, C, W) bool."""
        wanted = is_wanted & self.is_there[:, None]
        if wanted.shape[2] <= size:
            return wanted
        up_to = wanted.cumsum(2, dtype=torch.int32)
        return wanted & (up_to > up_to[:, :, -1:] - size)

    @torch.no_grad()
    def best(self, score: Tensor, size: int) -> Tensor:
        """Of the events that are there, the ``size`` with the largest score (Q, C, W): (Q, C, W) bool."""
        is_there = self.is_there[:, None].expand_as(score)
        if score.shape[2] <= size:
            return is_there
        chosen = score.masked_fill(~is_there, -torch.inf).topk(size, -1, sorted=False).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(2, chosen, True) & is_there


def with_absent(rows: Rows) -> Rows:
    """Rows (N, F) and behind them one of zeros, which stands for an absent event."""
    return tuple(torch.cat([r, r.new_zeros(1, r.shape[1])]) for r in rows)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (N + 1, F) at index (...), -1 for the absent event's, to (..., F)."""
    return embedding(torch.where(index < 0, len(rows) - 1, index), rows)


def masked_softmax(logits: Tensor, is_there: Tensor) -> Tensor:
    """Softmax over the last dimension of what is there; all zero where nothing is. float32."""
    weight = logits.float().masked_fill(~is_there, torch.finfo(torch.float32).min).softmax(-1)
    return weight * is_there


def beside_product(read: Tensor, candidate_x: Tensor) -> Tensor:
    """[read; read * candidate], normed: (..., D) to (..., 2D). The DIN authors' code feeds its head so, too."""
    read = norm(read)
    return torch.cat([read, read * norm(candidate_x)], -1)


def match(q: Tensor, k: Tensor) -> Tensor:
    """Logits (H, Q, C, W) of q (H, Q, C, E) and k: (H, W, E) of one stretch for all, or (H, Q, W, E), an own each."""
    if k.ndim == 4:
        return q @ k.transpose(-2, -1)
    return (q.flatten(1, 2) @ k.transpose(-2, -1)).unflatten(1, q.shape[1:3])


def weigh(weight: Tensor, v: Tensor) -> Tensor:
    """What weights (H, Q, C, W) make of v, as ``match`` has k: (H, Q, C, E)."""
    if v.ndim == 4:
        return weight @ v
    return (weight.flatten(1, 2) @ v).unflatten(1, weight.shape[1:3])


class SideBias(nn.Module):
    """A bias on attention logits, per head: by age, by place, and for an event of the candidate's own item."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.age = nn.Embedding(GAP_BUCKETS, num_heads)
        self.place = nn.Embedding(POSITION_BUCKETS, num_heads)
        self.same_item = nn.Parameter(torch.full((num_heads,), SAME_ITEM_LOGIT))
        nn.init.zeros_(self.age.weight)
        nn.init.zeros_(self.place.weight)

    def forward(self, window: Window, is_same: Tensor) -> Tensor:
        """With is_same (Q, C, W), the bias (H, Q, C, W)."""
        sides = small_lookup(self.age.weight, window.age_bucket) + small_lookup(self.place.weight, window.place_bucket)
        return sides[:, :, None] + is_same * self.same_item[:, None, None, None]
