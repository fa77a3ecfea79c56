"""Run a model over the impressions of a split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from vista.batches.plans import Feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.config import TrainConfig
from vista.devices import device_of
from vista.models.model import Model
from vista.progress import Progress

SCORING_REQUESTS = 512  # requests of one batch
SCORING_SEGMENTS = 64  # segments of one stretch: no gradients, so longer than in training


@dataclass(frozen=True)
class Scores:
    """impression (N,) int64 rows of the split, ascending; probability (N, T) float64; request (N,) int64 rows."""

    impression: np.ndarray
    probability: np.ndarray
    request: np.ndarray


@torch.no_grad()
def score(model: Model, feed: Feed, label: str = "score", quiet: bool = False) -> Scores:
    """Probabilities of every impression of ``feed``, each from the newest summary border before its request."""
    was_training = model.training
    model.eval()
    scoring: TrainConfig = replace(
        feed.config.train, requests_per_step=SCORING_REQUESTS, window_segments=SCORING_SEGMENTS
    )
    device = device_of(model)
    walk = TimelineWalk(replace(feed, train=False, config=replace(feed.config, train=scoring)))
    carry, impressions, probabilities = MemoryCarry(), [], []
    with Progress(label, total=walk.num_requests, unit="requests", quiet=quiet) as progress:
        for step in (step.to(device) for step in walk):
            output = model(step.batch, carry.gather(step, model.init_memory(len(step.users))))
            carry.keep(step, output.memory)
            is_valid = step.batch.is_valid
            impressions.append(step.batch.impression[is_valid].cpu().numpy())
            probabilities.append(output.logits[is_valid].double().sigmoid().cpu().numpy())
            progress.advance(len(step.batch.requests.summary))
    model.train(was_training)
    num_tasks = feed.impressions.label.shape[1]
    impression = np.concatenate([np.zeros(0, np.int64), *impressions])
    probability = np.concatenate([np.zeros((0, num_tasks)), *probabilities])
    order = np.argsort(impression)
    request = np.searchsorted(feed.impressions.offsets, impression[order], side="right") - 1
    return Scores(impression[order], probability[order], request)
