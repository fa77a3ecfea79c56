"""The best scores there can be, in closed form: expectations over the labels, which are drawn from known probabilities.

Shape letter: M impressions.
"""

from __future__ import annotations

import math

import numpy as np

Score = dict[str, float | None]  # ne, auc, log_loss; None = cannot be measured


def expected(probability: np.ndarray, score: np.ndarray) -> Score:
    """What a model that answers ``score`` gets in expectation when labels are drawn from ``probability``; both (M,).

    log_loss is -mean(p ln s + (1 - p) ln(1 - s)), in nats, and infinite when a possible label got s = 0; ne divides it
    by the entropy of mean(p). auc is the expected number of rightly ordered (positive, negative) pairs, ties a half,
    over the expected number of pairs. Each is None where mean(p) is 0 or 1. With score = probability it is the best
    possible.
    """
    base = float(probability.mean()) if len(probability) else 0.0
    if not 0 < base < 1:
        return {"ne": None, "auc": None, "log_loss": None}
    surprise = -_times_log(probability, score) - _times_log(1 - probability, 1 - score)
    log_loss = abs(float(surprise.mean()))  # abs: no -0.0
    entropy = -base * math.log(base) - (1 - base) * math.log1p(-base)
    return {"ne": log_loss / entropy, "auc": _expected_auc(probability, score), "log_loss": log_loss}


def _times_log(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """weight * ln(value), 0 where the weight is 0."""
    with np.errstate(divide="ignore"):
        return weight * np.where(weight > 0, np.log(value), 0.0)


def _expected_auc(probability: np.ndarray, score: np.ndarray) -> float:
    _, level = np.unique(score, return_inverse=True)
    positives = np.bincount(level, probability)
    negatives = np.bincount(level, 1 - probability)
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / positives.sum() / negatives.sum())


def cell_means(probability: np.ndarray, *facts: np.ndarray) -> np.ndarray:
    """The mean probability of the impressions that agree in all facts (M,): the best that a model which knows no more
    than these can answer. """  # fmt: skip
    _, cell = np.unique(np.column_stack([_level(fact) for fact in facts]), axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    return (np.bincount(cell, probability) / np.bincount(cell))[cell]


def _level(count: np.ndarray) -> np.ndarray:
    """Counts up to 8 as they are, larger ones to half an octave: few enough cells for their means to be right."""
    return np.where(count <= 8, count, 8 + np.floor(2 * np.log2(np.maximum(count, 8) / 8) + 0.5)).astype(np.int64)
