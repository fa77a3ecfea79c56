"""Items and events as vectors.

An item's vector is the same wherever it stands, in a history or as a candidate (tied): its own row, its categorical
features and a projection of its given vectors, summed. An event adds what depends on that event and the one before it
(action, time gap, hour, weekday), so that no vector changes when later events arrive. Age is known only when reading,
and enters there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vista.catalogue import Catalogue
from vista.models.inputs import NO_GAP_US, US_PER_S, Events
from vista.schema import NUM_CONTEXT_BUCKETS, ContextColumn

HOUR_US = 3600 * US_PER_S
GAP_BUCKETS = 34  # 0: no event before; 1 + floor(log2(1 + seconds)), the last for 2^32 s (136 years) and more
ITEM_SCALE = 1.0  # standard deviation of a fresh item vector's entries
MOST_DEVIATIONS = 100.0  # a value beyond it is a mistake, and must not make a logit that is no number
CONTEXT_CATEGORY_WIDTH = 8  # of the vector of a categorical context value
SIDE_SCALE = 0.1  # of everything added to it: small, so that at first equal items look equal


@dataclass(frozen=True)
class ItemTables:
    """What the model must know of the catalogue: per item index the embedding row, the features and the vectors.

    embedding_row (I,) int64; features (I, F) int64; vectors (I, sum of widths) float32;
    num_rows: rows of the embedding table; feature_sizes: values per feature, 0 = unknown included.
    """

    embedding_row: Tensor
    features: Tensor
    vectors: Tensor
    num_rows: int
    feature_sizes: tuple[int, ...]

    @classmethod
    def of(cls, catalogue: Catalogue) -> ItemTables:
        vectors = [catalogue.vectors[name] for name in sorted(catalogue.vectors)]
        joined = np.concatenate(vectors, 1) if vectors else np.zeros((catalogue.num_indices, 0), np.float32)
        return cls(
            embedding_row=torch.from_numpy(catalogue.embedding_row.astype(np.int64)),
            features=torch.from_numpy(catalogue.features.astype(np.int64)),
            vectors=torch.from_numpy(joined.astype(np.float32)),
            num_rows=catalogue.num_rows,
            feature_sizes=catalogue.feature_sizes,
        )


class ItemEmbedding(nn.Module):
    """Item index (...) to vectors (..., D)."""

    embedding_row: Tensor
    features: Tensor
    vectors: Tensor

    def __init__(self, tables: ItemTables, width: int) -> None:
        super().__init__()
        # From the catalogue file beside the weights, not from the weights: it can be far larger than the network.
        self.register_buffer("embedding_row", tables.embedding_row, persistent=False)
        self.register_buffer("features", tables.features, persistent=False)
        self.register_buffer("vectors", tables.vectors, persistent=False)
        self.feature_sizes = tables.feature_sizes
        self.rows = nn.Embedding(tables.num_rows, width, sparse=True)
        self.by_feature = nn.ModuleList(nn.Embedding(size, width) for size in tables.feature_sizes)
        has_vectors = tables.vectors.shape[1] > 0
        self.from_vectors = nn.Linear(tables.vectors.shape[1], width, bias=False) if has_vectors else None
        nn.init.normal_(self.rows.weight, std=ITEM_SCALE)
        for weight in self.by_feature.parameters():
            nn.init.normal_(weight, std=ITEM_SCALE)

    def forward(self, item: Tensor) -> Tensor:
        x = self.rows(self.embedding_row[item])
        if len(self.by_feature):
            for table, code in zip(self.by_feature, self.features[item].unbind(-1), strict=True):
                x = x + table(code)
        if self.from_vectors is not None:
            x = x + self.from_vectors(self.vectors[item])
        return x


class EventEmbedding(nn.Module):
    """Item, action, time gap, hour and weekday, each (...), to event vectors (..., D)."""

    def __init__(self, items: ItemEmbedding, num_actions: int, width: int) -> None:
        super().__init__()
        self.items = items
        self.action = nn.Embedding(num_actions + 1, width)
        self.gap = nn.Embedding(GAP_BUCKETS, width)
        self.hour = nn.Embedding(24, width)
        self.weekday = nn.Embedding(7, width)
        for table in (self.action, self.gap, self.hour, self.weekday):
            nn.init.normal_(table.weight, std=SIDE_SCALE)

    def forward(self, item: Tensor, action: Tensor, timestamp_us: Tensor, gap_us: Tensor) -> Tensor:
        action, gap, hour, weekday = self.side_codes(action, timestamp_us, gap_us)
        side = self.action(action) + self.gap(gap) + self.hour(hour) + self.weekday(weekday)
        return self.items(item) + side

    def side_codes(self, action: Tensor, timestamp_us: Tensor, gap_us: Tensor) -> tuple[Tensor, ...]:
        """What an event adds to its item: rows of the tables action, gap, hour and weekday, (...) each."""
        hours = timestamp_us.div(HOUR_US, rounding_mode="floor")
        weekday = (hours.div(24, rounding_mode="floor") + 4) % 7  # 1970-01-01 was a Thursday
        known = action.clamp(max=self.action.num_embeddings - 1)
        return known, gap_bucket(gap_us), hours % 24, weekday

    def side_table(self) -> Tensor:
        """The four tables, one below the other, for `embedding_bag` with ``side_rows``."""
        return torch.cat([table.weight for table in self._side])

    def side_rows(self, events: Events) -> Tensor:
        """The rows of ``side_table`` that each event adds to its item, (N, 4) int64."""
        codes = torch.stack(self.side_codes(events.action, events.timestamp_us, events.gap_us), -1)
        sizes = torch.tensor([table.num_embeddings for table in self._side], device=codes.device)
        return codes + (sizes.cumsum(0) - sizes)

    @property
    def _side(self) -> tuple[nn.Embedding, ...]:
        return self.action, self.gap, self.hour, self.weekday


def gap_bucket(gap_us: Tensor) -> Tensor:
    """0 for no event before, else 1 + floor(log2(1 + seconds)), at most GAP_BUCKETS - 1; int64."""
    # float64: log2 of an integer must not round up across a bucket's border differently from one machine to the next
    seconds = gap_us.clamp(min=0).to(torch.float64) / US_PER_S
    bucket = 1 + torch.floor(torch.log2(1 + seconds)).to(torch.int64)
    return torch.where(gap_us == NO_GAP_US, 0, bucket.clamp(max=GAP_BUCKETS - 1))


class ContextEncoder(nn.Module):
    """Context columns (..., X) as prepared data holds them to (..., width): numbers standardised, categories embedded.

    NaN stands for not given: the mean of a number, a vector of its own for a category. A number further than
    MOST_DEVIATIONS from the mean counts as that far.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, columns: tuple[ContextColumn, ...]) -> None:
        super().__init__()
        self.num_columns = len(columns)
        self.numbers = [i for i, column in enumerate(columns) if column.kind == "number"]
        self.categories = [i for i, column in enumerate(columns) if column.kind == "category"]
        self.register_buffer("mean", torch.tensor([columns[i].mean for i in self.numbers]), persistent=False)
        self.register_buffer("std", torch.tensor([max(columns[i].std, 1e-6) for i in self.numbers]), persistent=False)
        not_given = 1
        self.tables = nn.ModuleList(
            nn.Embedding(NUM_CONTEXT_BUCKETS + not_given, CONTEXT_CATEGORY_WIDTH) for _ in self.categories
        )
        for weight in self.tables.parameters():
            nn.init.normal_(weight, std=SIDE_SCALE)
        self.width = len(self.numbers) + CONTEXT_CATEGORY_WIDTH * len(self.categories)

    def forward(self, context: Tensor) -> Tensor:
        parts = [context[..., :0]]
        if self.numbers:
            deviation = (context[..., self.numbers] - self.mean) / self.std
            parts.append(deviation.nan_to_num(0.0).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS))
        if self.categories:
            buckets = context[..., self.categories].nan_to_num(NUM_CONTEXT_BUCKETS).long()
            parts += [table(bucket) for table, bucket in zip(self.tables, buckets.unbind(-1), strict=True)]
        return torch.cat(parts, -1)
