"""The control that knows no sequence: a small network on exact counts.

How often and how lately the user met this item and its categories, at several half-lives, and how popular both are.
Rankers in production hand-craft such features; a sequence model that does not beat them has not earned its cost.

Shape letters: Q requests, C candidates, F count features, X context columns, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vista.config import ModelConfig
from vista.models.batch import Memory, Output, Requests, TimelineBatch
from vista.models.embeddings import ContextEncoder
from vista.schema import ContextColumn


class CountsModel(nn.Module):
    """Two hidden layers on standardised counts and context."""

    def __init__(
        self, config: ModelConfig, num_tasks: int, context: tuple[ContextColumn, ...], num_counts: int
    ) -> None:
        super().__init__()
        self.config = config
        self.standardise = nn.BatchNorm1d(num_counts, affine=False)
        self.context = ContextEncoder(context)
        self.first = nn.Linear(num_counts + self.context.width, config.head_width)
        self.second = nn.Linear(config.head_width, config.head_width)
        self.head = nn.Linear(config.head_width, num_tasks)

    def forward(self, batch: TimelineBatch, memory: Memory) -> Output:
        """Score a batch; there is no memory to carry."""
        return Output(self.rank(batch.requests), ())

    def init_memory(self, num_lanes: int) -> Memory:
        return ()

    def rank(self, requests: Requests) -> Tensor:
        """Logits (Q, C, T)."""
        counts = requests.counts
        assert counts is not None
        is_valid = requests.candidate > 0  # padding must not enter the running statistics
        x = torch.zeros_like(counts)
        x[is_valid] = self.standardise(counts[is_valid])
        x = silu(self.first(torch.cat([x, self.context(requests.context)], -1)))
        return self.head(silu(self.second(x)))
