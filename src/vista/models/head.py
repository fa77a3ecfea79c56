"""The head that all models share: what was read of the user, the candidate and the context, to one logit per task.

Shape letters: Q requests, C candidates, T tasks, R raw events, F count features, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from vista.config import ModelConfig
from vista.models.batch import Requests
from vista.models.embeddings import ContextEncoder
from vista.models.inputs import US_PER_S
from vista.models.layers import norm

HISTORY_FEATURES = 2  # length and age


class Head(nn.Module):
    """One hidden layer on [read; candidate; context; length and age of the history; exact counts, if any]."""

    def __init__(
        self, config: ModelConfig, context: ContextEncoder, read_width: int, num_tasks: int, num_counts: int = 0
    ) -> None:
        super().__init__()
        self.context = context
        self.counts = CountsEncoder(num_counts) if num_counts else None
        self.layers = nn.Sequential(
            nn.Linear(read_width + config.width + context.width + HISTORY_FEATURES + num_counts, config.head_width),
            nn.SiLU(),
            nn.Linear(config.head_width, num_tasks),
        )

    def forward(self, read: Tensor, candidate_x: Tensor, requests: Requests) -> Tensor:
        """Logits (Q, C, T) from what each candidate read (Q, C, read_width) and its item vector (Q, C, D)."""
        parts = [read, norm(candidate_x), self.context(requests.context), _history_features(requests)]
        if self.counts is not None:
            parts.append(self.counts(requests))
        return self.layers(torch.cat(parts, -1).to(read.dtype)).float()


class CountsEncoder(nn.Module):
    """Exact counts (Q, C, F), standardised by running statistics; zero where there is no candidate."""

    def __init__(self, num_counts: int) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(num_counts, affine=False)

    def forward(self, requests: Requests) -> Tensor:
        counts = requests.counts
        assert counts is not None
        is_valid = requests.candidate > 0
        if not self.training:  # shapes that depend on no value, for graphs that are traced
            known = self.standardise(counts.flatten(0, -2)).view_as(counts)
            return known.masked_fill(~is_valid[..., None], 0.0)
        x = torch.zeros_like(counts)  # padding must not enter the running statistics
        x[is_valid] = self._standardised(counts[is_valid])
        return x

    def _standardised(self, counts: Tensor) -> Tensor:
        if self.training and len(counts) < 2:  # no variance of their own
            running = self.standardise
            return batch_norm(counts, running.running_mean, running.running_var, eps=running.eps)
        return self.standardise(counts)


def _history_features(requests: Requests) -> Tensor:
    """(Q, C, 2): the length of the history and the time since its last event, log-scaled."""
    last_us = requests.recent_us[:, -1] if requests.recent_us.shape[1] else requests.timestamp_us
    last_age_s = ((requests.timestamp_us - last_us).clamp(min=0) / US_PER_S).masked_fill(requests.num_known == 0, 0.0)
    features = torch.stack([requests.num_known.float().log1p(), last_age_s.log1p()], -1) / 10
    return features[:, None, :].expand(-1, requests.candidate.shape[1], -1)
