"""Small random inputs for model tests."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.config import ModelConfig
from vista.models.embeddings import EventEmbedding, ItemEmbedding, ItemTables
from vista.models.inputs import Events
from vista.models.summarizer import Summarizer

NUM_ITEMS, NUM_ACTIONS = 40, 3
DAY_US = 86_400 * 1_000_000


def catalogue(num_items: int = NUM_ITEMS) -> Catalogue:
    first = 5
    rows = np.arange(first + num_items, dtype=np.int32)
    features = (np.arange(first + num_items, dtype=np.int32) % 6)[:, None]
    features[:first] = 0
    return Catalogue(
        ids=np.arange(num_items),
        embedding_row=rows,
        num_unknown_buckets=first - 1,
        features=features,
        feature_names=("category",),
        feature_values=(tuple("abcde"),),
    )


def model_config(**changes: object) -> ModelConfig:
    small = {"segment_events": 8, "recent_events": 16, "num_seeds": 4, "width": 12, "num_heads": 2, "num_layers": 2}
    return ModelConfig(**(small | changes))  # type: ignore[arg-type]


def summarizer(seed: int = 0, **changes: object) -> Summarizer:
    torch.manual_seed(seed)
    config = model_config(**changes)
    items = ItemEmbedding(ItemTables.of(catalogue()), config.width)
    made = Summarizer(config, EventEmbedding(items, NUM_ACTIONS, config.width)).eval()
    with torch.no_grad():  # a fresh unit adds nothing; a trained one does
        for name, parameter in made.named_parameters():
            if name.endswith("unit.out.weight") or "mass" in name:
                parameter.normal_(std=0.2)
    return made


def histories(lengths: list[int], seed: int = 0) -> Events:
    """Random events of users with these many each, with equal timestamps and a gap of ten years among them."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    gaps = rng.choice([0, 1_000_000, 60_000_000, DAY_US, 3650 * DAY_US], total, p=[0.2, 0.4, 0.2, 0.19, 0.01])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.zeros(total, np.int64)
    for a, b in itertools.pairwise(offsets):
        times[a:b] = 10**15 + np.cumsum(gaps[a:b])
    return Events.from_log(
        torch.from_numpy(rng.integers(1, 5 + NUM_ITEMS, total)),
        torch.from_numpy(rng.integers(0, NUM_ACTIONS + 1, total)),
        torch.from_numpy(times),
        torch.from_numpy(offsets),
    )


def slice_users(events: Events, starts: list[int], ends: list[int]) -> Events:
    """Events starts[u] .. ends[u] - 1 of each user, as a log would deliver them: without gaps."""
    index = [
        torch.arange(int(events.offsets[u]) + a, int(events.offsets[u]) + b)
        for u, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]
    rows = torch.cat(index) if index else torch.zeros(0, dtype=torch.int64)
    offsets = torch.tensor([0, *np.cumsum([len(i) for i in index])])
    return Events.from_log(events.item[rows], events.action[rows], events.timestamp_us[rows], offsets)
