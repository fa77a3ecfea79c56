"""The full ranking: where the item asked for stands among all items.

Items among the newest ``length`` events before it are left out, as Zhai et al.'s code does; the one asked for is ranked
even where it is among them.

Shape letters: B users, V items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from vista.benchmark.leave_one_out.split import LeaveOneOut, Part
from vista.evaluation.metrics import Metrics, mean_reciprocal_rank, positive_rank, ranking_metrics
from vista.models.next_item import NextItemModel
from vista.progress import Progress

KS = (10, 50)
USERS_AT_ONCE = 64  # of like length: little padding, and what lies between layers stays in cache
Score = Callable[[np.ndarray], np.ndarray]  # users (B,) to scores of all items (B, V + 1)


def rank_all(split: LeaveOneOut, part: Part, score: Score, quiet: bool = False) -> Metrics:
    """HR@K and NDCG@K of every user's item, and MRR."""
    ranks = []
    with Progress(f"rank {part}", total=split.sequences.num_users, unit="users", quiet=quiet) as progress:
        for users in by_length(split, part):
            ranks.append(ranks_of(split, part, users, score(users)))
            progress.advance(len(users))
    rank = np.concatenate(ranks)
    return ranking_metrics(rank, KS) | {"mrr": mean_reciprocal_rank(rank)}


def ranks_of(split: LeaveOneOut, part: Part, users: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The rank of each user's item, (B,), given scores (B, V + 1), which are changed."""
    every, target = np.arange(len(users)), split.target(users, part)
    of_target = scores[every, target].copy()
    scores[split.seen(users, part)] = -np.inf
    scores[every, target] = -np.inf
    return positive_rank(of_target, scores[:, 1:])


def by_length(split: LeaveOneOut, part: Part) -> Iterator[np.ndarray]:
    """All users, those of like length together."""
    users = np.arange(split.sequences.num_users)
    order = users[np.argsort(split.num_read(users, part), kind="stable")]
    yield from np.split(order, range(USERS_AT_ONCE, len(order), USERS_AT_ONCE))


def by_popularity(split: LeaveOneOut) -> Score:
    """Every user gets the items most met in training."""
    counts = split.counts().astype(np.float64)
    return lambda users: np.tile(counts, (len(users), 1))


def by_model(split: LeaveOneOut, part: Part, model: NextItemModel, device: str) -> Score:
    """The scores of a model in evaluation mode."""

    @torch.no_grad()
    def score(users: np.ndarray) -> np.ndarray:
        batch, _ = split.batch(users, part)
        scores: np.ndarray = (model(batch.to(device)) @ model.item_vectors().T).cpu().numpy()
        return scores

    return score
