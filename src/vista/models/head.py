"""The head that all models share: what was read of the user, the candidate and the context, to one logit per task.

Shape letters: Q requests, C candidates, T tasks, R raw events, F count features, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.models.batch import Requests
from vista.models.embeddings import ContextEncoder
from vista.models.inputs import US_PER_S
from vista.models.layers import norm

HISTORY_FEATURES = 2  # length and age
LEAST_DEVIATION = 0.1  # of a logarithm: what hardly varied where it was measured may vary more elsewhere


class Head(nn.Module):
    """One hidden layer on [read; candidate; context; length and age of the history; exact counts, if any].

    What reads counts has two logits that are added: the other one is of a network that knows neither the candidate's
    vector nor what it read, as the model ``counts`` does (after Cheng et al., "Wide & deep learning for recommender
    systems", 2016). In one network the vectors, which learn training impressions by heart, cost more than they tell.
    """

    def __init__(
        self, config: ModelConfig, context: ContextEncoder, read_width: int, num_tasks: int, num_counts: int = 0
    ) -> None:
        super().__init__()
        self.context = context
        self.dropout = nn.Dropout(config.dropout)
        facts_width = context.width + HISTORY_FEATURES + num_counts
        self.layers = mlp(read_width + config.width + facts_width, [config.head_width], num_tasks)
        self.counts = CountsEncoder(num_counts) if num_counts else None
        self.of_facts = mlp(facts_width, [config.head_width] * 2, num_tasks) if num_counts else None

    def forward(self, read: Tensor, candidate_x: Tensor, requests: Requests) -> Tensor:
        """Logits (Q, C, T) from what each candidate read (Q, C, read_width) and its item vector (Q, C, D)."""
        facts = [self.context(requests.context), history_features(requests)]
        if self.counts is not None:
            facts.append(self.counts(requests))
        vectors = [self.dropout(read), self.dropout(norm(candidate_x))]
        logits = self.layers(torch.cat([*vectors, *facts], -1).to(read.dtype))
        if self.of_facts is not None:
            logits = logits + self.of_facts(torch.cat(facts, -1).to(read.dtype))
        return logits.float()


def mlp(width: int, hidden: list[int], num_outputs: int) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.SiLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


class CountsEncoder(nn.Module):
    """Exact counts (Q, C, F), standardised; zero where there is no candidate.

    By what is measured once, before training: requests of a step are of few users, so statistics of a batch would say
    another thing at each step, and another again in serving.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_counts: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_counts))
        self.register_buffer("scale", torch.ones(num_counts))
        self._moments: Tensor | None = None  # while measuring: (3, F) float64, how many, their sum and sum of squares

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it, forward takes in what it is given; at the end, mean and scale are those of all of it."""
        self._moments = self.mean.new_zeros(3, len(self.mean), dtype=torch.float64)
        try:
            yield
            mean, square = self._moments[1:] / self._moments[0].clamp(min=1)
            deviation = (square - mean**2).clamp(min=0).sqrt()
            self.mean.copy_(mean)
            self.scale.copy_(deviation.clamp(min=LEAST_DEVIATION))
        finally:
            self._moments = None

    def forward(self, requests: Requests) -> Tensor:
        counts = requests.counts
        assert counts is not None
        is_valid = requests.candidate > 0
        if self._moments is not None:
            x = counts[is_valid].double()
            self._moments += torch.stack([torch.full_like(self._moments[0], len(x)), x.sum(0), (x * x).sum(0)])
        return ((counts - self.mean) / self.scale).masked_fill(~is_valid[..., None], 0.0)


def history_features(requests: Requests) -> Tensor:
    """(Q, C, 2): the length of the history and the time since its last event, log-scaled."""
    last_us = requests.recent_us[:, -1] if requests.recent_us.shape[1] else requests.timestamp_us
    last_age_s = ((requests.timestamp_us - last_us).clamp(min=0) / US_PER_S).masked_fill(requests.num_known == 0, 0.0)
    features = torch.stack([requests.num_known.float().log1p(), last_age_s.log1p()], -1) / 10
    return features[:, None, :].expand(-1, requests.candidate.shape[1], -1)
