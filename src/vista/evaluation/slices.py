"""The same metrics on parts of the impressions: where does a model know more than another?

Four ways to part them, each of which has its own question:

- ``history length``: events known before the request. Does a longer history help?
- ``distance``: events since the user last met the item shown. How sure is the model about things that far back?
- ``positive distance``: how far back the *positive* was last met, against all negatives of its request. Can the model
  find what the user met that long ago? This is the slice in which models that forget fall behind.
- ``source``: all positives against the negatives of one source. Which negatives are hard to tell apart?

NE compares with the base rate of its own slice, so the NE of two slices do not compare; two models on one slice do.

Shape letters: C impressions, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vista.data.histories import Impressions
from vista.evaluation.metrics import Metrics, evaluate_task, hit_rate_at_k, ndcg_at_k, ranks_in_requests
from vista.schema import SOURCES


@dataclass(frozen=True)
class Buckets:
    """Ranges of whole numbers: ``first_name`` below starts[0], then starts[i] .. starts[i + 1] - 1, the last open."""

    first_name: str
    starts: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        ranges = zip(self.starts, self.starts[1:], strict=False)
        return (self.first_name, *(f"{low:,}-{end - 1:,}" for low, end in ranges), f"{self.starts[-1]:,}+")

    def index(self, values: np.ndarray) -> np.ndarray:
        """The bucket of each value, (n,) int64."""
        return np.searchsorted(self.starts, values, side="right")


HISTORY_LENGTH = Buckets("0", (1, 101, 1_001, 10_001, 100_001))
DISTANCE = Buckets("never", (1, 65, 513, 4_097, 32_769))  # -1, not met, is below the first start
SLICES = ("history length", "distance", "positive distance", "source")


@dataclass(frozen=True)
class ScoredImpressions:
    """Impressions with a model's probabilities, and what they are parted by.

    labels (C, T) 0 or 1; probabilities (C, T) float64; user, request, num_known, distance (C,) int64: distance is
    the events since the user last met the item, -1 = never; source (C,) an index into SOURCES; tasks: T names.
    """

    tasks: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    user: np.ndarray
    request: np.ndarray
    num_known: np.ndarray
    distance: np.ndarray
    source: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.user), len(self.tasks))
        assert self.labels.shape == self.probabilities.shape == shape, (self.labels.shape, self.probabilities.shape)

    @classmethod
    def of(
        cls,
        impressions: Impressions,
        tasks: Sequence[str],
        impression: np.ndarray,
        probabilities: np.ndarray,
        distance: np.ndarray,
    ) -> ScoredImpressions:
        """impression (C,): the rows of the split that were scored, ascending.

        distance: of *all* rows of the split, from ``vista.data.counts.last_met``.
        """
        request = np.searchsorted(impressions.offsets, impression, side="right") - 1
        return cls(
            tuple(tasks),
            impressions.label[impression],
            probabilities,
            np.asarray(impressions.user)[request],
            request,
            np.asarray(impressions.num_known)[request],
            distance[impression],
            impressions.source[impression],
        )

    def metrics(self, task: int, rows: np.ndarray | slice = slice(None)) -> Metrics:
        """All metrics of one task over some rows, and how its requests rank the candidates they showed.

        ``shown_hr@1`` and ``shown_ndcg@10``: of the one positive among the request's candidates in these rows;
        ``shown_requests``: how many requests have exactly one positive there.
        """
        labels, probabilities = self.labels[rows, task], self.probabilities[rows, task]
        rank = ranks_in_requests(labels, probabilities, self.request[rows])
        shown: Metrics = {
            "shown_hr@1": hit_rate_at_k(rank, 1),
            "shown_ndcg@10": ndcg_at_k(rank, 10),
            "shown_requests": len(rank),
        }
        return evaluate_task(labels, probabilities, self.user[rows]) | shown


@dataclass(frozen=True)
class Slice:
    """The metrics of one task on one part: ``by`` is one of SLICES, ``bucket`` the name of the part."""

    task: str
    by: str
    bucket: str
    metrics: Metrics = field(default_factory=dict)


def all_slices(scored: ScoredImpressions) -> tuple[Slice, ...]:
    """Every slice that holds an impression, of every task, in the order of SLICES and of the buckets."""
    return tuple(
        Slice(name, by, bucket, scored.metrics(task, rows))
        for task, name in enumerate(scored.tasks)
        for by, bucket, rows in _parts(scored, task)
        if len(rows)
    )


def _parts(scored: ScoredImpressions, task: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(by, bucket, rows) of each part."""
    is_positive = scored.labels[:, task] == 1
    length, distance = HISTORY_LENGTH.index(scored.num_known), DISTANCE.index(scored.distance)
    for bucket, name in enumerate(HISTORY_LENGTH.names):
        yield "history length", name, np.flatnonzero(length == bucket)
    near_to_far = [*list(enumerate(DISTANCE.names))[1:], (0, DISTANCE.first_name)]  # never is farther than any distance
    for bucket, name in near_to_far:
        yield "distance", name, np.flatnonzero(distance == bucket)
    lane = np.unique(scored.request, return_inverse=True)[1]
    for bucket, name in near_to_far:
        is_found = is_positive & (distance == bucket)
        has_found = np.bincount(lane[is_found], minlength=int(lane.max(initial=-1)) + 1) > 0
        yield "positive distance", name, np.flatnonzero(is_found | (has_found[lane] & ~is_positive))
    for source, name in enumerate(SOURCES):
        is_negative = ~is_positive & (scored.source == source)
        rows = np.flatnonzero(is_positive | is_negative) if is_negative.any() else np.zeros(0, np.int64)
        yield "source", name, rows
