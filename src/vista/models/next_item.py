"""Models that predict the next item among all: a query vector per event, and its dot product with every item.

The layers are those of the lifelong models; only the head differs, because there is no candidate to begin from:

    sasrec, hstu    the encoder of ``vista.models.baselines`` over the newest ``history_events`` events; an event's row
                    in its output is the query
    vista           stage 1 as it is; in stage 2 a learned query with the newest event's vector stands where a
                    candidate would, and reads the tokens of the newest border, the newest ``recent_events`` events and
                    itself
    recent          the same without tokens

Score (Zhai et al. 2024, after their published code): cos(query, item) / temperature. Item vectors are tied: times
sqrt(D) they are what is read of an event. They begin small, as there.

Shape letters: B users, N events, P queries, n rows of each user, G blocks of queries, S events in a segment, K summary
tokens, R recent events, D width, H heads, V items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vista.config import ModelConfig
from vista.models.baselines import hstu, sasrec
from vista.models.baselines.causal import Stretches
from vista.models.embeddings import EventEmbedding, ItemEmbedding, ItemTables, gap_bucket
from vista.models.inputs import Events, Progress, newest_index, ragged_index
from vista.models.layers import norm, small_lookup
from vista.models.ranker import TargetAttention
from vista.models.summarizer import Summarizer
from vista.ops.order import SegmentOrder

FRESH_ITEM_SCALE = 0.02  # standard deviation of a fresh item vector's entries, before the factor sqrt(D)
FRESH_QUERY_SCALE = 0.1


@dataclass(frozen=True)
class NextItemBatch:
    """Histories of B users and the moments at which their next item is asked for.

    events     what is known of the users, user after user
    asked_us   (N,) int64: when the user acted next after each event; from then a query looks back
    row        (P,) int64, ascending: the event after which each query is asked
    """

    events: Events
    asked_us: Tensor
    row: Tensor

    def to(self, device: torch.device | str) -> NextItemBatch:
        return NextItemBatch(self.events.to(device), self.asked_us.to(device), self.row.to(device))


class NextItemModel(nn.Module, ABC):
    """``forward`` gives a query per moment; ``item_vectors`` what it is compared with."""

    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = ScaledItems(num_items, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, batch: NextItemBatch) -> Tensor:
        """Queries (P, D) of length 1."""
        return normalize(self.read(batch), dim=-1)

    def item_vectors(self) -> Tensor:
        """(V + 1, D) of length 1; row 0 is no item."""
        return normalize(self.items.rows.weight, dim=-1)

    @abstractmethod
    def read(self, batch: NextItemBatch) -> Tensor:
        """Queries (P, D) of any length."""


class ScaledItems(ItemEmbedding):
    """Item vectors without features, times sqrt(D); gradients are dense, since every item is compared at every step."""

    def __init__(self, num_items: int, width: int) -> None:
        index = torch.arange(num_items + 1)
        nothing = ItemTables(index, index.new_zeros(num_items + 1, 0), torch.zeros(num_items + 1, 0), num_items + 1, ())
        super().__init__(nothing, width)
        self.rows = nn.Embedding(num_items + 1, width)
        nn.init.normal_(self.rows.weight, std=FRESH_ITEM_SCALE)

    def forward(self, item: Tensor) -> Tensor:
        return super().forward(item) * self.rows.weight.shape[1] ** 0.5


class EncoderNextItem(NextItemModel):
    """A causal encoder over users side by side, newest event last, in as many columns as the longest history has."""

    def read(self, batch: NextItemBatch) -> Tensor:
        lengths, ends = batch.events.lengths(), batch.events.offsets[1:]
        width = int(lengths.max())
        index = newest_index(ends, lengths, width)
        flat = index.clamp(min=0)
        of = Stretches(
            batch.events.timestamp_us[flat], index >= 0, self.config.history_events, batch.asked_us[flat], keeps=True
        )
        user = torch.searchsorted(ends, batch.row, right=True)
        column = batch.row - ends[user] + width
        first = int(column.min()) if len(column) else 0
        x = self.encode(self.dropout(self.items(batch.events.item[flat])), of, first)
        return x[user, column - first]

    @abstractmethod
    def encode(self, x: Tensor, of: Stretches, first: int) -> Tensor:
        """Event vectors (B, n, D) to the encoder's output from row ``first`` on, (B, n - first, D)."""


class SASRecNextItem(EncoderNextItem):
    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        self.blocks = nn.ModuleList(sasrec.SASRecBlock(config) for _ in range(config.encoder_layers))
        self.last_norm = nn.LayerNorm(config.width)

    def encode(self, x: Tensor, of: Stretches, first: int) -> Tensor:
        return self.last_norm(sasrec.encode_rows(list(self.blocks), x, of, first))  # type: ignore[arg-type]


class HSTUNextItem(EncoderNextItem):
    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        self.layers = nn.ModuleList(hstu.HSTULayer(config) for _ in range(config.encoder_layers))
        for layer in self.layers:
            layer.same_item.requires_grad_(False)  # of candidates, of which there are none here

    def encode(self, x: Tensor, of: Stretches, first: int) -> Tensor:
        return hstu.encode_rows(list(self.layers), x, of, first)  # type: ignore[arg-type]


class SummaryNextItem(NextItemModel):
    """VISTA's two stages with a query for the next item; ``recent`` leaves stage 1 out.

    Queries after the same border read the same tokens: they are one *block*, and stand beside one another where a
    request's candidates do.
    """

    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        self.embedding = EventEmbedding(self.items, num_actions=0, width=config.width)
        self.summarizer = Summarizer(config, self.embedding) if config.kind == "vista" else None
        self.blocks = nn.ModuleList(TargetAttention(config) for _ in range(config.ranker_layers))
        self.target = nn.Parameter(FRESH_QUERY_SCALE * torch.randn(config.width))
        for block in self.blocks:
            block.same_item.requires_grad_(False)  # of candidates, of which there are none here

    def read(self, batch: NextItemBatch) -> Tensor:
        events = batch.events
        event_x = self.dropout(self.embedding(events.item, events.action, events.timestamp_us, events.gap_us))
        blocks = QueryBlocks.of(batch, self.config.segment_events, self.config.recent_events)
        x = event_x.new_zeros(*blocks.is_asked.shape, self.config.width)
        x[blocks.is_asked] = self.target + event_x[batch.row]
        tokens = self.tokens(events, event_x, blocks)
        for block in self.blocks:
            assert isinstance(block, TargetAttention)
            recent = block.keys_values(event_x[blocks.recent.clamp(min=0)])
            x = block(x, block.keys_values(tokens), recent, blocks.bias(block))
        return norm(x)[blocks.is_asked]

    def tokens(self, events: Events, event_x: Tensor, blocks: QueryBlocks) -> Tensor:
        """Summary tokens (G, K, D) as of each block's border."""
        if self.summarizer is None:
            return event_x.new_zeros(len(blocks.user), 0, self.config.width)
        size = self.config.segment_events
        num_segments = events.lengths() // size
        order = SegmentOrder.of(num_segments)
        before = num_segments.cumsum(0) - num_segments
        ordinal = torch.arange(len(order.user), device=before.device) - before[order.user]
        starts = events.offsets[order.user] + ordinal * size
        index = ragged_index(starts, torch.full_like(starts, size), size)
        initial = self.summarizer.init_state(events.num_users).memory
        after, _ = self.summarizer.fold(self.summarizer.segments_of(events, event_x, index), order, initial)
        row = torch.where(blocks.border > 0, events.num_users + before[blocks.user] + blocks.border - 1, blocks.user)
        at_border = tuple(
            tuple(
                tuple(torch.cat([b, a])[row] for b, a in zip(running, later, strict=True))
                for running, later in zip(layer, layer_after, strict=True)
            )
            for layer, layer_after in zip(initial, after, strict=True)
        )
        return self.summarizer.read_memory(at_border, blocks.progress(events, size))


@dataclass(frozen=True)
class QueryBlocks:
    """G blocks of up to S queries each.

    user, border (G,): whose, and after how many closed segments; is_asked (G, S) bool: by how many events behind the
    border; recent (G, R + S - 1): rows of the events in reach of any of them, -1 for none; is_seen (G, S, R + S - 1);
    age, place: the buckets of both, (G, S, R + S - 1) and (S, R + S - 1).
    """

    user: Tensor
    border: Tensor
    is_asked: Tensor
    recent: Tensor
    is_seen: Tensor
    age: Tensor
    place: Tensor

    @classmethod
    def of(cls, batch: NextItemBatch, size: int, num_recent: int) -> QueryBlocks:
        """Blocks of a batch's queries, for segments of ``size`` events and ``num_recent`` recent ones."""
        events, row = batch.events, batch.row
        user = torch.searchsorted(events.offsets[1:], row, right=True)
        known = row + 1 - events.offsets[user]
        most = int(events.lengths().max()) // size + 1
        key, lane = torch.unique(user * most + known // size, return_inverse=True)
        block_user, border = key // most, key % most
        is_asked = torch.zeros(len(key), size, dtype=torch.bool, device=row.device)
        is_asked[lane, known % size] = True
        asked_us = torch.zeros(len(key), size, dtype=torch.int64, device=row.device)
        asked_us[lane, known % size] = batch.asked_us[row]
        column = torch.arange(num_recent + size - 1, device=row.device)
        slot = torch.arange(size, device=row.device)
        place = slot[:, None] + num_recent - column  # 1: the newest event that the query of a slot knows
        in_history = (border * size - num_recent)[:, None] + column
        recent = torch.where(in_history >= 0, events.offsets[block_user][:, None] + in_history, -1)
        recent = recent.clamp(max=len(events.item) - 1)  # those behind the last query, which nobody sees
        is_seen = ((place >= 1) & (place <= num_recent)) & (recent >= 0)[:, None] & is_asked[..., None]
        age = gap_bucket((asked_us[..., None] - events.timestamp_us[recent.clamp(min=0)][:, None]).clamp(min=0))
        place_bucket = place.clamp(1, num_recent).float().log2().floor().long()
        return cls(block_user, border, is_asked, recent, is_seen, age, place_bucket)

    def bias(self, block: TargetAttention) -> Tensor:
        """(G, H, S, R + S - 1): by age and by place, and minus infinity for an event that a query does not know."""
        bias = (
            small_lookup(block.age_bias.weight, self.age)
            + small_lookup(block.position_bias.weight, self.place)[:, None]
        )
        return bias.transpose(0, 1).masked_fill(~self.is_seen[:, None], float("-inf"))

    def progress(self, events: Events, size: int) -> Progress:
        """How far each block's border has read."""
        count, start = self.border * size, events.offsets[self.user]
        nothing = count == 0
        first, last = events.timestamp_us[start], events.timestamp_us[(start + count - 1).clamp(min=0)]
        return Progress(count, first.masked_fill(nothing, -1), last.masked_fill(nothing, -1))


def make_next_item_model(config: ModelConfig, num_items: int) -> NextItemModel:
    """The model a config names: sasrec, hstu, vista or recent."""
    match config.kind:
        case "sasrec":
            return SASRecNextItem(config, num_items)
        case "hstu":
            return HSTUNextItem(config, num_items)
        case "vista" | "recent":
            return SummaryNextItem(config, num_items)
        case _:
            raise AssertionError(config.model)
