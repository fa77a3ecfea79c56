"""Feeds: what a pass over one split reads, for the model that a config names."""

from __future__ import annotations

import numpy as np

from vista.batches.plans import Feed
from vista.config import Config
from vista.data.counts import CountFeatures
from vista.data.histories import PreparedData
from vista.data.popularity import PopularityFeatures


def make_feed(data: PreparedData, config: Config, split: str) -> tuple[Feed, tuple[str, ...]]:
    """The feed of one split, with count features where the model reads them, and their names."""
    impressions, model = data.impressions(split), config.model
    counts: CountFeatures | PopularityFeatures
    if model.with_counts:
        counts = CountFeatures.of(data, impressions, model.count_last_events or None, model.count_predecessors)
    elif model.has_popularity:
        counts = PopularityFeatures.of(data, impressions, model.popularity_hours)
    else:
        return Feed(data.histories, impressions, config), ()
    return Feed(data.histories, impressions, config, count_features=counts), counts.feature_names


def users_up_to(feed: Feed, max_requests: int, seed: int) -> np.ndarray:
    """Users drawn at random until they have ``max_requests`` requests together."""
    users, counts = np.unique(feed.impressions.user, return_counts=True)
    order = np.random.default_rng([seed, 1]).permutation(len(users))
    enough = int(np.searchsorted(np.cumsum(counts[order]), max_requests)) + 1
    return np.sort(users[order[:enough]])
