"""Items for a user from the whole catalogue: every one scored where that fits, else those a first stage lets through.

The ranker is no dot product, so no index of vectors finds its best items. The first stage asks instead what can be
found fast and is likely to score well: items the user's state names (recent events, the sketch), the nearest items to
the recent ones by the model's own item vectors, and what the model puts first for a user without events.

Shape letters: V items, D width, T tasks.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from vista.errors import RequestError, nearest
from vista.serving.deployment import Model
from vista.serving.lanes import too_late
from vista.serving.options import Limits
from vista.serving.requests import Filters, RecommendAsk, shown
from vista.serving.scorer import Asked, UserSummaries

BLOCK_ITEMS = 4096  # scored between two looks at the clock
NUM_SEEDS = 16  # newest distinct items whose neighbours are looked for
NUM_NEIGHBOURS = 100  # of each
NUM_FIRST = 1000  # best items of a user without events


@dataclass(frozen=True)
class Recommended:
    """The best items: index (k,) and probability (k, T), best first by the first task; how many were scored."""

    model: Model
    index: np.ndarray
    probability: np.ndarray
    num_scored: int
    is_exact: bool
    is_known_user: bool
    num_events: int
    as_of_us: int
    is_degraded: bool


class Recommender:
    """Recommends with one model."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        catalogue = model.run.catalogue
        self._first, self._num_items = catalogue.first_item, catalogue.num_items
        self._max_exact_items = limits.max_exact_items
        self._lock = threading.Lock()
        self._vectors: torch.Tensor | None = None
        self._cold: np.ndarray | None = None

    def _choice(self, filters: Filters) -> np.ndarray:
        """Which items may be recommended, (V,) bool. Raises RequestError for a feature or value that is not there."""
        catalogue = self.model.run.catalogue
        allowed = np.ones(self._num_items, bool)
        if filters.exclude:
            index = catalogue.encode(filters.exclude)
            allowed[index[index >= self._first] - self._first] = False
        for name, values in filters.category.items():
            if name not in catalogue.feature_names:
                hint = nearest(name[:80], catalogue.feature_names) or "; this catalogue has none"
                raise RequestError(f"filters.category: items have no feature {shown(name)}{hint}")
            column = catalogue.feature_names.index(name)
            codes = {str(value): code for code, value in enumerate(catalogue.feature_values[column], 1)}
            unknown = [value for value in values if str(value) not in codes]
            if unknown:
                raise RequestError(
                    f"filters.category, {shown(name)}: no item has {shown(unknown[0])}; give values of the catalogue"
                )
            wanted = [codes[str(value)] for value in values]
            allowed &= np.isin(catalogue.features[self._first :, column], wanted)
        return allowed

    def recommend(
        self, summaries: UserSummaries, ask: RecommendAsk, is_degraded: bool, deadline_s: float
    ) -> Recommended:
        """The best ``ask.k`` of the items that its filters allow.

        Raises RequestError for a feature or value that is not there, and when the deadline passes on the way.
        """
        allowed = self._choice(ask.filters)
        if ask.filters.exclude_seen:
            allowed[self._named(summaries)] = False
        is_exact = int(allowed.sum()) <= self._max_exact_items  # as many as filters leave
        considered = allowed if is_exact else allowed & self._first_stage(summaries, ask.at_us)
        index = np.flatnonzero(considered) + self._first
        probability = self._score(summaries, index, ask.at_us, deadline_s)
        best = np.argsort(-probability[:, 0], kind="stable")[: ask.k]
        return Recommended(
            self.model, index[best], probability[best], len(index), is_exact,
            bool(summaries.is_known[0]), int(summaries.num_events[0]), int(summaries.as_of_us[0]), is_degraded,
        )  # fmt: skip

    def _score(self, summaries: UserSummaries, index: np.ndarray, at_us: int, deadline_s: float) -> np.ndarray:
        """Probabilities (n, T), a block at a time."""
        parts = [np.zeros((0, len(self.model.run.schema.tasks)))]
        for first in range(0, len(index), BLOCK_ITEMS):
            if time.monotonic() > deadline_s:
                raise too_late()
            parts += self.model.scorer.score(summaries, [Asked(index[first : first + BLOCK_ITEMS], at_us)])
        return np.concatenate(parts)

    def _named(self, summaries: UserSummaries) -> np.ndarray:
        """Places in the catalogue of the items that a user's state names: recent events, and a sketch's."""
        named = [summaries.recent.item[0].numpy()]
        sketch = self.model.scorer.model.sketch
        if sketch is not None:
            named.append(sketch.items(tuple(t[0] for t in summaries.sketch)).numpy())
        found = np.unique(np.concatenate(named))
        return found[found >= self._first] - self._first

    def _first_stage(self, summaries: UserSummaries, at_us: int) -> np.ndarray:
        """Which items are worth scoring, (V,) bool."""
        chosen = np.zeros(self._num_items, bool)
        chosen[self._named(summaries)] = True
        chosen[self._best_when_cold(at_us)] = True
        seeds = list(dict.fromkeys(summaries.recent.item[0].flip(0).tolist()))
        seeds = [item for item in seeds if item >= self._first][:NUM_SEEDS]
        if seeds:
            vectors = self._item_vectors()
            near = vectors[torch.tensor(seeds) - self._first] @ vectors.T
            chosen[near.topk(min(NUM_NEIGHBOURS, self._num_items)).indices.flatten().numpy()] = True
        return chosen

    @torch.no_grad()
    def _item_vectors(self) -> torch.Tensor:
        """Of length one, (V, D)."""
        with self._lock:
            if self._vectors is None:
                items = torch.arange(self._first, self._first + self._num_items)
                vectors = [self.model.scorer.model.embedding.items(part) for part in items.split(BLOCK_ITEMS)]
                self._vectors = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
            return self._vectors

    def _best_when_cold(self, at_us: int) -> np.ndarray:
        """Places of the best items of a user without events; found once, whatever the first request's deadline."""
        with self._lock:
            if self._cold is None:
                index = np.arange(self._first, self._first + self._num_items)
                probability = self._score(self.model.scorer.cold(1), index, at_us, float("inf"))
                self._cold = np.argsort(-probability[:, 0], kind="stable")[:NUM_FIRST]
            return self._cold
