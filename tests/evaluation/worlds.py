"""Scored impressions of a made-up world, for the tests of slices and reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vista.evaluation.slices import ScoredImpressions


def scored_world(noise: float, seed: int = 0, num_requests: int = 400, size: int = 10) -> ScoredImpressions:
    """Two tasks; one positive of the first in each request. noise: how far the probabilities lie from the truth."""
    rng = np.random.default_rng([seed, 1])
    truth = np.random.default_rng(0)  # the same impressions whatever the seed of the model
    n = num_requests * size
    affinity = truth.normal(size=(num_requests, size))
    click = (affinity == affinity.max(1, keepdims=True)).ravel()
    like = truth.random(n) < 0.3
    logits = np.stack([1.5 * affinity.ravel() - 3.2, 2.0 * like - 1.5], 1) + noise * rng.normal(size=(n, 2))
    user = np.sort(truth.integers(0, 40, num_requests))
    return ScoredImpressions(
        ("click", "like"),
        np.stack([click, like], 1).astype(np.int8),
        1 / (1 + np.exp(-logits)),
        np.repeat(user, size),
        np.repeat(np.arange(num_requests), size),
        np.repeat((10 ** truth.uniform(0, 5.5, num_requests)).astype(np.int64), size),
        np.where(truth.random(n) < 0.3, -1, (10 ** truth.uniform(0, 5, n)).astype(np.int64)),
        np.where(click, 1, truth.integers(2, 5, n)).astype(np.int8),
    )


def take(scored: ScoredImpressions, rows: np.ndarray) -> ScoredImpressions:
    """Some rows."""
    arrays = ("labels", "probabilities", "user", "request", "num_known", "distance", "source")
    return replace(scored, **{name: getattr(scored, name)[rows] for name in arrays})
