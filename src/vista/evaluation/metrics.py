"""How good scores are: one function per metric, numpy alone.

Each says where it comes from, its formula, what it gives when there is nothing to measure (nan), and what ties do.
Labels are 0 or 1, probabilities lie in 0 .. 1, scores are any order; anything else raises DataError. So does a score of
nan, because every comparison with it is false and a diverged model would otherwise rank first.

Shape letters: C impressions, T tasks, Q requests with a rank, U users, N bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vista.errors import DataError

LEAST_PROBABILITY = float(np.finfo(np.float64).eps)  # a certain and wrong answer costs 36 nats, not infinity
NUM_CALIBRATION_BINS = 20  # 5 % of the impressions each
Metrics = dict[str, float]  # name -> value; counts are whole numbers, what cannot be measured is nan


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood of the labels, in nats; smaller is better.

    Source: the binary cross entropy; Good (1952), "Rational decisions".
    Formula: -mean(y ln p + (1 - y) ln(1 - p)), with p kept within LEAST_PROBABILITY of 0 and 1.
    Empty: nan. Ties: each impression stands for itself.
    """
    y, p = _checked_probabilities(labels, probabilities)
    if not len(y):
        return math.nan
    p = np.clip(p, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return float(-np.log(np.where(y, p, 1 - p)).mean())


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Log loss relative to that of always answering the base rate (NE): below 1 is better than knowing nothing.

    Source: He et al. (2014), "Practical lessons from predicting clicks on ads at Facebook".
    Formula: log loss / -(b ln b + (1 - b) ln(1 - b)), b the mean of the labels evaluated (not of training).
    Empty, or all labels equal: nan, there is no entropy to normalize by. Ties: each impression stands for itself.
    """
    y, p = _checked(labels, probabilities)
    base_rate = y.mean() if len(y) else 0.0
    if base_rate in (0, 1):
        return math.nan
    return log_loss(y, p) / float(-base_rate * np.log(base_rate) - (1 - base_rate) * np.log1p(-base_rate))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a random positive scores above a random negative (area under the ROC curve).

    Source: Hanley and McNeil (1982); equal to the Mann-Whitney statistic.
    Formula: mean over all pairs (positive, negative) of [s+ > s-] + [s+ = s-] / 2.
    Empty, or one class alone: nan. Ties: a tied pair counts a half, so a constant score gives 1/2.
    """
    y, s = _checked(labels, scores)
    positives, negatives = s[y], np.sort(s[~y])
    if not len(positives) or not len(negatives):
        return math.nan
    positives = np.sort(positives)  # neighbours search in the same place of memory
    below = np.searchsorted(negatives, positives)
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).sum() / 2 / len(positives) / len(negatives))


@dataclass(frozen=True)
class Gauc:
    """AUC per user: its weighted mean, how many users have both classes, and how many were left out."""

    value: float
    num_users: int
    num_users_left_out: int


def gauc(labels: np.ndarray, scores: np.ndarray, user: np.ndarray) -> Gauc:
    """AUC within each user, averaged with the user's number of impressions as weight.

    Source: Zhou et al. (2018), "Deep Interest Network for click-through rate prediction", after Zhu et al. (2017).
    Formula: sum_u n_u AUC_u / sum_u n_u over the users who have both a positive and a negative.
    Empty, or no such user: nan. Users with one class alone have no AUC: they are left out, and counted.
    Ties: a tied pair of one user counts a half; scores of different users are never compared.
    """
    y, s = _checked(labels, scores)
    if not len(y):
        return Gauc(math.nan, 0, 0)
    code, is_positive = _sorted_within_user(y, s, user)
    starts = np.flatnonzero(np.diff(code, prepend=code[0] - 1))  # runs of equal (user, score)
    run_size = np.diff(starts, append=len(code))
    user_of_run = code[starts] // len(code)
    first_run = np.flatnonzero(np.diff(user_of_run, prepend=-1))
    num_shown = np.add.reduceat(run_size, first_run)
    place_in_user = starts - np.repeat(starts[first_run], np.diff(first_run, append=len(starts)))
    mid_rank = place_in_user + (run_size + 1) / 2
    run_positives = np.add.reduceat(is_positive, starts)
    num_positive = np.add.reduceat(run_positives, first_run)
    rank_sum = np.add.reduceat(run_positives * mid_rank, first_run)
    has_both = (num_positive > 0) & (num_positive < num_shown)
    p, n = num_positive[has_both], num_shown[has_both]
    per_user = (rank_sum[has_both] - p * (p + 1) / 2) / (p * (n - p))
    value = float((per_user * n).sum() / n.sum()) if len(n) else math.nan
    return Gauc(value, int(has_both.sum()), int((~has_both).sum()))


def _sorted_within_user(y: np.ndarray, s: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (user * C + rank of the score, equal for equal scores) in ascending order, and the labels in that order.

    One sort of plain integers, the label in the lowest bit: several times faster than np.lexsort.
    """
    order = np.argsort(s)
    is_new = np.ones(len(s), bool)
    is_new[1:] = s[order[1:]] != s[order[:-1]]
    rank = np.empty(len(s), np.int64)
    rank[order] = np.cumsum(is_new) - 1
    lane = np.unique(user, return_inverse=True)[1]
    code = np.sort((lane * len(s) + rank) * 2 + y)
    return code >> 1, code & 1


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean prediction over mean label: 1 is right on average, above 1 promises too much.

    Source: He et al. (2014), as for NE. Formula: mean(p) / mean(y).
    Empty, or no positive: nan. Ties: each impression stands for itself.
    """
    y, p = _checked_probabilities(labels, probabilities)
    return float(p.mean() / y.mean()) if y.any() else math.nan


@dataclass(frozen=True)
class CalibrationBin:
    """Impressions with probabilities lowest .. highest: how many, what was predicted and what happened, on average."""

    lowest: float
    highest: float
    count: int
    mean_probability: float
    mean_label: float


def calibration_curve(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[CalibrationBin, ...]:
    """The reliability curve, in bins of about equally many impressions, ascending.

    Source: DeGroot and Fienberg (1983). Formula: per bin mean(p) and mean(y); the bins part the sorted probabilities.
    Empty: no bins. Ties: equal probabilities are never parted, so there may be fewer and larger bins.
    """
    y, p = _checked_probabilities(labels, probabilities)
    order = np.argsort(p)
    y, p = y[order], p[order]
    edges = np.searchsorted(p, p[np.arange(num_bins) * len(p) // num_bins]) if len(p) else np.zeros(0, np.int64)
    starts = np.unique(edges)
    if not len(starts):
        return ()
    sizes = np.diff(starts, append=len(p))
    probability, label = np.add.reduceat(p, starts) / sizes, np.add.reduceat(y, starts, dtype=np.float64) / sizes
    columns = (p[starts], p[starts + sizes - 1], sizes, probability, label)
    return tuple(CalibrationBin(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def positive_rank(positive: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The rank of each positive among its competitors, (Q,) int64, 1 = best.

    positive (Q,): its score; others (Q, n): scores of the other candidates, -inf for one that does not compete.
    Formula: 1 + number of others with a score not below. Empty (n = 0): rank 1.
    Ties: pessimistic, the positive comes last among equals, so a model that gives everything one score gains nothing.
    """
    _refuse_nan(positive)
    _refuse_nan(others)
    return 1 + (others >= positive[:, None]).sum(1, dtype=np.int64)


def ranks_in_requests(labels: np.ndarray, scores: np.ndarray, request: np.ndarray) -> np.ndarray:
    """The rank of the positive within each request that has exactly one, ascending by request, (Q,) int64.

    labels, scores, request (C,): request is any integer that is equal within a request.
    Ties: pessimistic, as in ``positive_rank``. Requests without a positive, or with several, give no rank.
    """
    y, s = _checked(labels, scores)
    lane = np.unique(request, return_inverse=True)[1]
    has_one = np.bincount(lane[y], minlength=int(lane.max(initial=-1)) + 1) == 1
    best = np.full(len(has_one), np.inf)
    best[lane[y]] = s[y]
    not_below = np.bincount(lane[s >= best[lane]], minlength=len(has_one))  # the positive itself is among them
    return not_below[has_one].astype(np.int64)


def hit_rate_at_k(rank: np.ndarray, k: int) -> float:
    """Share of requests whose positive is among the first k (HR@k).

    Source: Deshpande and Karypis (2004), "Item-based top-N recommendation algorithms".
    Formula: mean of [rank <= k]. Empty: nan. Ties: decided by the rank, see ``positive_rank``.
    """
    return float((rank <= k).mean()) if len(rank) else math.nan


def ndcg_at_k(rank: np.ndarray, k: int) -> float:
    """Normalized discounted cumulative gain of one positive per request.

    Source: Järvelin and Kekäläinen (2002), "Cumulated gain-based evaluation of IR techniques".
    Formula: mean of [rank <= k] / log2(1 + rank); the ideal, rank 1, gives 1.
    Empty: nan. Ties: decided by the rank, see ``positive_rank``.
    """
    return float(np.where(rank <= k, 1 / np.log2(1.0 + rank), 0.0).mean()) if len(rank) else math.nan


def mean_reciprocal_rank(rank: np.ndarray) -> float:
    """MRR: how near the top the positive stands, over the whole list.

    Source: Voorhees (1999), "The TREC-8 question answering track report".
    Formula: mean of 1 / rank. Empty: nan. Ties: decided by the rank, see ``positive_rank``.
    """
    return float((1 / rank).mean()) if len(rank) else math.nan


def ranking_metrics(rank: np.ndarray, ks: Sequence[int] = (1, 10)) -> Metrics:
    """hit_rate_at_k and ndcg_at_k for several k, and the number of ranks: ``hr@10``, ``ndcg@10``, ``num_ranked``."""
    metrics: Metrics = {"num_ranked": len(rank)}
    for k in ks:
        metrics |= {f"hr@{k}": hit_rate_at_k(rank, k), f"ndcg@{k}": ndcg_at_k(rank, k)}
    return metrics


def evaluate_task(labels: np.ndarray, probabilities: np.ndarray, user: np.ndarray) -> Metrics:
    """All metrics of one task over impressions; labels, probabilities and user are (C,)."""
    y, p = _checked(labels, probabilities)
    per_user = gauc(y, p, user)
    return {
        "num_impressions": len(y),
        "num_positives": int(y.sum()),
        "base_rate": float(y.mean()) if len(y) else math.nan,
        "ne": normalized_entropy(y, p),
        "log_loss": log_loss(y, p),
        "auc": auc(y, p),
        "gauc": per_user.value,
        "gauc_users": per_user.num_users,
        "gauc_users_left_out": per_user.num_users_left_out,
        "calibration": calibration(y, p),
    }


def evaluate_scores(
    labels: np.ndarray, probabilities: np.ndarray, user: np.ndarray, tasks: Sequence[str]
) -> dict[str, Metrics]:
    """All metrics of every task: labels and probabilities (C, T), user (C,); task name -> metric name -> value."""
    assert labels.shape == probabilities.shape == (len(user), len(tasks)), (labels.shape, probabilities.shape, tasks)
    return {task: evaluate_task(labels[:, t], probabilities[:, t], user) for t, task in enumerate(tasks)}


@dataclass(frozen=True)
class Estimate:
    """The mean over runs (seeds) and its standard error; nan where there are too few runs to tell."""

    mean: float
    standard_error: float
    num_runs: int

    def __str__(self) -> str:
        """The mean, with its standard error where there is one: ``0.7881 ± 0.0012``."""
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.4f}" + ("" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}")

    @property
    def in_standard_errors(self) -> float:
        """How many standard errors the mean lies from 0, with its sign; nan where the error is not known."""
        if self.standard_error == 0:
            return math.copysign(math.inf, self.mean) if self.mean else 0.0
        return self.mean / self.standard_error


def mean_and_standard_error(values: Sequence[float]) -> Estimate:
    """The mean of one metric over runs, and how far it may be off.

    Formula: s / sqrt(n), s the standard deviation with n - 1. Empty: nan. One run: its value, standard error nan.
    A run whose metric is nan makes the mean nan: a failed run is not passed over in silence.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    return Estimate(mean, float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan, n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of first - second over runs that share seed and data, and its standard error.

    The differences are taken run by run, so what the seed does to both cancels. Empty and one run: as
    ``mean_and_standard_error``. Raises DataError when there is not one value of each per run.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} runs cannot be paired: run both models with the same seeds")
    return mean_and_standard_error([a - b for a, b in zip(first, second, strict=True)])


def _checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool and scores as float64. Raises DataError where either cannot be evaluated."""
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    assert labels.shape == scores.shape, (labels.shape, scores.shape)
    if labels.dtype != bool and not ((labels == 0) | (labels == 1)).all():
        row = int(np.flatnonzero((labels != 0) & (labels != 1))[0])
        raise DataError(f"the label of impression {row} is {labels[row]}: labels are 0 or 1")
    _refuse_nan(scores)
    return labels.astype(bool), scores


def _checked_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, p = _checked(labels, probabilities)
    is_bad = (p < 0) | (p > 1)
    if is_bad.any():
        row = int(np.flatnonzero(is_bad)[0])
        raise DataError(f"the probability of impression {row} is {p[row]}: give probabilities, not logits")
    return y, p


def _refuse_nan(scores: np.ndarray) -> None:
    is_bad = np.isnan(scores)
    if is_bad.any():
        row = int(np.flatnonzero(is_bad)[0])
        raise DataError(f"the score of impression {row} is not a number: the model has diverged; train it again")
