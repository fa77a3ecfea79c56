"""What the baselines share: events as vectors, the raw events of each request, pieces that fit into memory, the head.

A baseline reads the newest ``history_events`` events before each request. Event vectors, and all projections of them,
are made once per batch, since requests of one user share most events; what depends on both the event and the candidate
is made per request, in pieces of requests of a bounded size. In training a piece is computed again on the way back
instead of being kept, so that the peak does not grow with requests x candidates x events.

Of ours, in all of them: event and item vectors (tied, with categories, actions and time), the head, and that a
candidate's own item counts as such among the events (``same_item``), as it does in our ranker. So that a comparison
shows how the history is read, and nothing else.

Shape letters: N event rows, Q requests, C candidates, R raw events, T tasks, D width, H heads, F width of something.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

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
from vista.models.layers import norm
from vista.models.model import Model
from vista.models.ranker import POSITION_BUCKETS, SAME_ITEM_LOGIT
from vista.schema import ContextColumn

NUMBERS_PER_PIECE = 2**24  # of a piece's largest intermediates: 64 MiB each in float32, some ten of them at a time

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

    def by_pieces(self, read: Read, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        """``read`` for any number of requests, in pieces of a bounded size, recomputed for the gradient."""
        numbers = self.numbers(candidate_x.shape[1], requests.recent.shape[1])
        pieces = list(in_pieces(requests, candidate_x, max(1, numbers)))
        if torch.is_grad_enabled() and sum(map(len, pieces)) > 1:
            read = partial(checkpoint, read, use_reentrant=False)
        return torch.cat([torch.cat([read(rows, part, x) for part, x in piece], 1) for piece in pieces])


def in_pieces(requests: Requests, candidate_x: Tensor, numbers: int) -> Iterator[list[tuple[Requests, Tensor]]]:
    """Pieces of requests, oldest events that all of a piece lack cut off; one request's candidates parted if need be.

    numbers: what one request takes. A piece is a list of its parts, side by side in the candidates.
    """
    at_once = max(1, NUMBERS_PER_PIECE // numbers)
    num_parts = -(-numbers // NUMBERS_PER_PIECE)
    columns = max(1, -(-candidate_x.shape[1] // num_parts))
    for first in range(0, max(1, len(candidate_x)), at_once):  # no request at all: one empty piece
        rows = slice(first, first + at_once)
        piece = requests.rows(rows)
        known = (piece.recent >= 0).sum(1).tolist()
        piece = piece.newest(max([1, *known]))
        yield [
            (piece.candidates(slice(start, start + columns)), candidate_x[rows, start : start + columns])
            for start in range(0, max(1, candidate_x.shape[1]), columns)
        ]


def with_absent(rows: Rows) -> Rows:
    """Rows (N, F) and behind them one of zeros, which stands for an absent event."""
    return tuple(torch.cat([r, r.new_zeros(1, r.shape[1])]) for r in rows)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (N + 1, F) at index (...), -1 for the absent event's, to (..., F)."""
    return embedding(torch.where(index < 0, len(rows) - 1, index), rows)


def along(values: Tensor, chosen: Tensor) -> Tensor:
    """values (Q, R) at places chosen (Q, C, k), to (Q, C, k)."""
    return values[:, None].expand(-1, chosen.shape[1], -1).gather(2, chosen)


def masked_softmax(logits: Tensor, is_there: Tensor) -> Tensor:
    """Softmax over the last dimension of what is there; all zero where nothing is. float32."""
    weight = logits.float().masked_fill(~is_there, torch.finfo(torch.float32).min).softmax(-1)
    return weight * is_there


def beside_product(read: Tensor, candidate_x: Tensor) -> Tensor:
    """[read; read * candidate], normed: (..., D) to (..., 2D). The DIN authors' code feeds its head so, too."""
    read = norm(read)
    return torch.cat([read, read * norm(candidate_x)], -1)


def is_same_item(requests: Requests) -> Tensor:
    """(Q, C, R) bool: whether an event is of the candidate's own item."""
    return requests.candidate[:, :, None] == requests.recent_item[:, None, :]


def age_bucket(requests: Requests) -> Tensor:
    """(Q, R): the bucket of the time from each event to the request."""
    return gap_bucket((requests.timestamp_us[:, None] - requests.recent_us).clamp(min=0))


def place_bucket(num_events: int, device: torch.device) -> Tensor:
    """(R,): floor(log2(place)), where the newest event's place is 1."""
    return torch.arange(num_events, 0, -1, device=device).float().log2().floor().long()


class SideBias(nn.Module):
    """A bias on attention logits, per head: by age, by place, and for an event of the candidate's own item."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.age = nn.Embedding(GAP_BUCKETS, num_heads)
        self.place = nn.Embedding(POSITION_BUCKETS, num_heads)
        self.same_item = nn.Parameter(torch.full((num_heads,), SAME_ITEM_LOGIT))
        nn.init.zeros_(self.age.weight)
        nn.init.zeros_(self.place.weight)

    def forward(self, age: Tensor, place: Tensor, is_same: Tensor) -> Tensor:
        """Buckets and is_same of shapes that broadcast to (...), to (..., H)."""
        return self.age(age) + self.place(place) + is_same[..., None] * self.same_item
