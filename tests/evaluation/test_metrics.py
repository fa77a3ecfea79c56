"""Every sentence of a metric's docstring, and agreement with scikit-learn on random data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.errors import DataError
from vista.evaluation.metrics import (
    auc,
    calibration,
    calibration_curve,
    evaluate_scores,
    gauc,
    hit_rate_at_k,
    log_loss,
    mean_and_standard_error,
    ndcg_at_k,
    normalized_entropy,
    paired_difference,
    positive_rank,
    ranking_metrics,
    ranks_in_requests,
)

NOTHING = np.zeros(0)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities with many ties, and users."""
    n, levels = draw(st.integers(2, 60)), draw(st.sampled_from([2, 5, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return rng.integers(0, 2, n), rng.integers(0, levels + 1, n) / levels, rng.integers(-3, 4, n)


# against scikit-learn


@settings(deadline=None)
@given(labelled())
def test_auc_equals_scikit_learn(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, _ = sample
    if labels.min() == labels.max():
        assert math.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))


@settings(deadline=None)
@given(labelled())
def test_log_loss_equals_scikit_learn(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, probabilities, _ = sample
    expected = sklearn.metrics.log_loss(labels, probabilities, labels=[0, 1])
    assert log_loss(labels, probabilities) == pytest.approx(expected)


@settings(deadline=None)
@given(labelled())
def test_gauc_is_the_weighted_auc_of_each_user(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, user = sample
    values, weights, left_out = [], [], 0
    for u in np.unique(user):
        mine = user == u
        if labels[mine].min() == labels[mine].max():
            left_out += 1
        else:
            values.append(sklearn.metrics.roc_auc_score(labels[mine], scores[mine]))
            weights.append(mine.sum())
    found = gauc(labels, scores, user)
    assert (found.num_users, found.num_users_left_out) == (len(values), left_out)
    expected = np.average(values, weights=weights) if values else math.nan
    assert found.value == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(num=st.integers(1, 12), size=st.integers(2, 30), k=st.integers(1, 30), seed=st.integers(0, 1000))
def test_ndcg_and_hit_rate_equal_scikit_learn(num: int, size: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(size, dtype=float), (num, 1)), axis=1)  # no ties
    place = rng.integers(0, size, num)
    labels = np.zeros((num, size))
    labels[np.arange(num), place] = 1
    others = scores.copy()
    others[np.arange(num), place] = -np.inf
    rank = positive_rank(scores[np.arange(num), place], others)
    assert ndcg_at_k(rank, k) == pytest.approx(sklearn.metrics.ndcg_score(labels, scores, k=k))
    if size > 2:  # scikit-learn takes two columns for a binary task
        expected = sklearn.metrics.top_k_accuracy_score(place, scores, k=k, labels=np.arange(size)) if k < size else 1
        assert hit_rate_at_k(rank, k) == pytest.approx(expected)
    flat = ranks_in_requests(labels.ravel(), scores.ravel(), np.repeat(np.arange(num), size))
    np.testing.assert_array_equal(flat, rank)


# log loss and normalized entropy


def test_a_certain_wrong_answer_costs_36_nats() -> None:
    assert log_loss(np.array([1]), np.array([0.0])) == pytest.approx(36.04, abs=0.01)
    assert log_loss(np.array([0]), np.array([1.0])) == pytest.approx(36.04, abs=0.01)


def test_log_loss_of_a_coin() -> None:
    assert log_loss(np.array([0, 1, 1]), np.full(3, 0.5)) == pytest.approx(math.log(2))


def test_base_rate_has_an_entropy_of_one() -> None:
    labels = np.array([1, 0, 0, 0, 0])
    assert normalized_entropy(labels, np.full(5, 0.2)) == pytest.approx(1)
    assert normalized_entropy(labels, np.array([0.5, 0.1, 0.1, 0.1, 0.1])) < 1
    assert normalized_entropy(labels, np.full(5, 0.5)) > 1


def test_entropy_is_normalized_by_the_labels_evaluated() -> None:
    labels, probabilities = np.array([1, 0, 0, 0]), np.array([0.9, 0.4, 0.2, 0.1])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert normalized_entropy(labels, probabilities) == pytest.approx(log_loss(labels, probabilities) / entropy)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_entropy_and_no_auc(label: int) -> None:
    labels, scores = np.full(3, label), np.array([0.1, 0.5, 0.9])
    assert math.isnan(normalized_entropy(labels, scores))
    assert math.isnan(auc(labels, scores))


# AUC and GAUC


def test_constant_score_has_auc_one_half() -> None:
    labels = np.array([0, 1, 1, 0, 0])
    assert auc(labels, np.full(5, 0.3)) == 0.5
    assert gauc(labels, np.full(5, 0.3), np.zeros(5)).value == 0.5


def test_a_tied_pair_counts_a_half() -> None:
    assert auc(np.array([1, 0, 0]), np.array([2.0, 2.0, 1.0])) == pytest.approx(0.75)


def test_gauc_weighs_users_by_impressions() -> None:
    labels = np.array([1, 0, 1, 0, 0, 0])
    scores = np.array([2.0, 1.0, 1.0, 2.0, 2.0, 2.0])  # first user right, second wrong
    assert gauc(labels, scores, np.array([7, 7, 9, 9, 9, 9])).value == pytest.approx(2 / 6)


def test_gauc_leaves_out_and_counts_users_with_one_class() -> None:
    labels, user = np.array([1, 0, 1, 0, 0]), np.array([0, 0, 1, 2, 2])
    found = gauc(labels, np.array([2.0, 1.0, 0.5, 0.5, 0.6]), user)
    assert (found.value, found.num_users, found.num_users_left_out) == (1.0, 1, 2)
    nobody = gauc(np.array([1, 1]), np.array([0.2, 0.3]), np.array([0, 1]))
    assert math.isnan(nobody.value)
    assert (nobody.num_users, nobody.num_users_left_out) == (0, 2)


def test_gauc_compares_no_scores_of_different_users() -> None:
    labels, user = np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1])
    scores = np.array([0.2, 0.1, 0.9, 0.8])
    assert gauc(labels, scores, user).value == 1.0
    assert auc(labels, scores) == 0.75


# calibration


def test_calibration_is_mean_prediction_over_mean_label() -> None:
    assert calibration(np.array([1, 0, 0, 0]), np.full(4, 0.5)) == pytest.approx(2)
    assert math.isnan(calibration(np.zeros(3), np.full(3, 0.5)))


def test_curve_has_equal_bins_of_ascending_probabilities() -> None:
    probabilities = np.random.default_rng(0).permutation(np.arange(100) / 100)
    bins = calibration_curve((probabilities >= 0.5).astype(int), probabilities, num_bins=4)
    assert [b.count for b in bins] == [25] * 4
    assert [b.lowest for b in bins] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert [b.highest for b in bins] == pytest.approx([0.24, 0.49, 0.74, 0.99])
    assert [b.mean_probability for b in bins] == pytest.approx([0.12, 0.37, 0.62, 0.87])
    assert [b.mean_label for b in bins] == [0, 0, 1, 1]


def test_curve_never_parts_equal_probabilities() -> None:
    bins = calibration_curve(np.array([1, 0] * 5), np.array([0.2] * 3 + [0.5] * 7), num_bins=5)
    assert [(b.lowest, b.highest, b.count) for b in bins] == [(0.2, 0.2, 3), (0.5, 0.5, 7)]
    assert sum(b.count for b in calibration_curve(np.zeros(3), np.array([0.1, 0.2, 0.3]), num_bins=20)) == 3


# ranks


def test_the_positive_comes_last_among_equals() -> None:
    assert positive_rank(np.array([0.5, 0.9]), np.array([[0.5, 0.5, 0.7], [0.5, 0.5, 0.7]])).tolist() == [4, 1]
    assert ranks_in_requests(np.array([0, 1, 0]), np.full(3, 0.5), np.zeros(3)).tolist() == [3]


def test_a_candidate_of_minus_infinity_does_not_compete() -> None:
    assert positive_rank(np.array([0.1]), np.array([[-np.inf, 0.5]])).tolist() == [2]
    assert positive_rank(np.array([0.1]), np.zeros((1, 0))).tolist() == [1]


def test_requests_without_exactly_one_positive_have_no_rank() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1])
    request = np.array([5, 5, 6, 6, 8, 8])
    assert ranks_in_requests(labels, np.array([1.0, 2, 3, 4, 6, 5]), request).tolist() == [2]
    assert ranks_in_requests(NOTHING, NOTHING, NOTHING).tolist() == []


def test_hit_rate_and_ndcg_by_hand() -> None:
    rank = np.array([1, 3, 11])
    assert ranking_metrics(rank, ks=(1, 10)) == pytest.approx(
        {"num_ranked": 3, "hr@1": 1 / 3, "ndcg@1": 1 / 3, "hr@10": 2 / 3, "ndcg@10": (1 + 1 / 2) / 3}
    )


# the empty case, and what cannot be evaluated


@pytest.mark.parametrize("metric", [log_loss, normalized_entropy, auc, calibration])
def test_nothing_to_measure_is_nan(metric: Callable[[np.ndarray, np.ndarray], float]) -> None:
    assert math.isnan(metric(NOTHING, NOTHING))


def test_nothing_to_rank_or_bin() -> None:
    assert math.isnan(hit_rate_at_k(NOTHING, 10))
    assert math.isnan(ndcg_at_k(NOTHING, 10))
    assert calibration_curve(NOTHING, NOTHING) == ()
    assert math.isnan(gauc(NOTHING, NOTHING, NOTHING).value)


@pytest.mark.parametrize("metric", [log_loss, normalized_entropy, auc, calibration, calibration_curve])
def test_a_diverged_model_is_refused(metric: Callable[[np.ndarray, np.ndarray], float]) -> None:
    with pytest.raises(DataError, match="impression 1 is not a number"):
        metric(np.array([0, 1]), np.array([0.5, np.nan]))


def test_a_diverged_model_does_not_rank_first() -> None:
    with pytest.raises(DataError, match="not a number"):
        positive_rank(np.array([np.nan]), np.array([[0.5]]))


def test_logits_and_other_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"impression 1 is 1\.5: give probabilities"):
        log_loss(np.array([0, 1]), np.array([0.5, 1.5]))
    with pytest.raises(DataError, match="label of impression 1 is 2"):
        auc(np.array([0, 2]), np.array([0.5, 0.5]))


# tasks and runs


def test_each_task_is_evaluated_by_itself() -> None:
    labels = np.array([[1, 0], [0, 0], [0, 1], [1, 1]], np.int8)
    probabilities = np.array([[0.9, 0.1], [0.1, 0.2], [0.2, 0.1], [0.8, 0.7]])
    found = evaluate_scores(labels, probabilities, np.array([0, 0, 1, 1]), ("click", "like"))
    assert list(found) == ["click", "like"]
    assert found["click"]["auc"] == found["click"]["gauc"] == 1
    assert found["like"]["auc"] == auc(labels[:, 1], probabilities[:, 1]) < 1
    assert found["like"]["gauc_users_left_out"] == 2
    assert {name: found["click"][name] for name in ("num_impressions", "num_positives", "base_rate")} == {
        "num_impressions": 4,
        "num_positives": 2,
        "base_rate": 0.5,
    }
    assert found["click"]["ne"] == pytest.approx(found["click"]["log_loss"] / math.log(2))


def test_standard_error_over_seeds() -> None:
    estimate = mean_and_standard_error([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.num_runs) == (2.0, 3)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert str(estimate) == "2.0000 ± 0.5774"
    assert estimate.in_standard_errors == pytest.approx(2 * math.sqrt(3))


def test_one_run_has_no_standard_error() -> None:
    one = mean_and_standard_error([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.standard_error)
    assert str(one) == "0.5000"
    assert math.isnan(mean_and_standard_error([]).mean)


def test_a_failed_run_is_not_passed_over() -> None:
    assert math.isnan(mean_and_standard_error([0.5, math.nan]).mean)


def test_paired_difference_cancels_the_seed() -> None:
    seeds = np.array([0.1, 0.5, 0.9])
    difference = paired_difference((seeds + 0.01).tolist(), seeds.tolist())
    assert difference.mean == pytest.approx(0.01)
    assert difference.standard_error == pytest.approx(0, abs=1e-12)
    assert difference.in_standard_errors > 1e6
    with pytest.raises(DataError, match="3 and 2 runs"):
        paired_difference([1, 2, 3], [1, 2])


def test_equal_runs_differ_by_no_standard_errors() -> None:
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).in_standard_errors == 0
