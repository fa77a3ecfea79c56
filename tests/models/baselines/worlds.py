"""Batches in which requests of all kinds occur, and models of every name, small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from tests.batches.test_timelines import CONTEXT, make_feed
from tests.models.worlds import NUM_ACTIONS, catalogue
from vista.batches.builder import Step
from vista.batches.plans import Feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.models.baselines.base import Baseline
from vista.models.batch import Requests
from vista.models.embeddings import ItemTables
from vista.models.model import Model
from vista.models.vista import make_model

NUM_COUNTS = 3
HISTORY, TOP_K = 24, 2  # shorter than the longest histories of the world, and than what a search finds


def feed_of(model: str, train: bool = False, **changes: object) -> Feed:
    """The timelines' test world, for a model; counts are made up, but the same for an impression wherever it stands."""
    feed = make_feed(train=train, requests_per_step=16, window_segments=3)
    settings: dict[str, object] = {"model": model, "history_events": HISTORY, "top_k": TOP_K, "head_width": 8}
    config = replace(feed.config, model=replace(feed.config.model, **(settings | changes)))
    counts = np.random.default_rng(5).normal(size=(feed.impressions.num_impressions, NUM_COUNTS)).astype(np.float32)
    reads_counts = config.model.with_counts
    return replace(feed, config=config, count_features=(lambda _, rows: counts[rows]) if reads_counts else None)


def model_for(feed: Feed, seed: int = 0) -> Model:
    """A model whose parts that start at nothing have something to say."""
    torch.manual_seed(seed)
    config = feed.config.model
    num_counts = NUM_COUNTS if config.with_counts else 0
    model = make_model(config, ItemTables.of(catalogue()), NUM_ACTIONS, 1, CONTEXT, num_counts)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


def baseline_for(feed: Feed) -> Baseline:
    model = model_for(feed)
    assert isinstance(model, Baseline)
    return model


def logits_of(model: Model, feed: Feed) -> dict[int, torch.Tensor]:
    """The logits of every impression, by its row."""
    carry, logits = MemoryCarry(), {}
    for step in TimelineWalk(feed, seed=1):
        output = model(step.batch, carry.gather(step, model.init_memory(len(step.users))))
        carry.keep(step, output.memory)
        is_valid = step.batch.is_valid
        rows = step.batch.impression[is_valid].tolist()
        logits |= dict(zip(rows, output.logits[is_valid].detach(), strict=True))
    return logits


def raw_of(model: Baseline, step: Step, request: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors (n, D), items (n,) and timestamps (n,) of a request's raw events, oldest first, without padding."""
    events, requests = step.batch.events, step.batch.requests
    rows = [row for row in requests.recent[request].tolist() if row >= 0]
    columns = (events.item, events.action, events.timestamp_us, events.gap_us)
    return model.embedding(*(c[rows] for c in columns)), events.item[rows], events.timestamp_us[rows]


def each_candidate(model: Baseline, step: Step) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Request, candidate and item vector of all candidates that are no padding."""
    requests: Requests = step.batch.requests
    for request, own in enumerate(requests.candidate.tolist()):
        for place, item in enumerate(own):
            if item:
                yield request, place, model.embedding.items(torch.tensor(item))
