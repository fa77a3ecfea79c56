"""The control that knows no sequence: a small network on exact counts, and on what the head of all models knows beside.

How often and how lately the user met this item and its categories, at several half-lives, and how popular both are.
Rankers in production hand-craft such features; a sequence model that does not beat them has not earned its cost.

Shape letters: Q requests, C candidates, F count features, X context columns, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.config import ModelConfig
from vista.models.batch import Memory, Requests, TimelineBatch
from vista.models.embeddings import ContextEncoder
from vista.models.head import HISTORY_FEATURES, CountsEncoder, history_features, mlp
from vista.models.model import Model
from vista.schema import ContextColumn


class CountsModel(Model):
    """Two hidden layers on [standardised counts; context; length and age of the history]."""

    def __init__(
        self, config: ModelConfig, num_tasks: int, context: tuple[ContextColumn, ...], num_counts: int
    ) -> None:
        super().__init__()
        self.config = config
        self.counts = CountsEncoder(num_counts)
        self.context = ContextEncoder(context)
        width = num_counts + self.context.width + HISTORY_FEATURES
        self.layers = mlp(width, [config.head_width] * 2, num_tasks)

    def prepare(self, batch: TimelineBatch, memory: Memory) -> tuple[None, Memory]:
        """Nothing: requests share nothing but the weights."""
        return None, ()

    def rank(self, prepared: None, requests: Requests) -> Tensor:
        """Logits (Q, C, T)."""
        facts = self.counts(requests), self.context(requests.context), history_features(requests)
        return self.layers(torch.cat(facts, -1))
