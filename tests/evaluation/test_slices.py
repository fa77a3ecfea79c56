"""Each slice holds the impressions it names, and no others."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.worlds import scored_world, take
from vista.data.histories import Impressions
from vista.errors import DataError
from vista.evaluation.metrics import auc, evaluate_task
from vista.evaluation.results import Evaluation
from vista.evaluation.slices import DISTANCE, HISTORY_LENGTH, SLICES, Metrics, ScoredImpressions, Slice, all_slices
from vista.schema import SOURCES


def only(parts: tuple[Slice, ...], task: str, by: str) -> dict[str, Metrics]:
    return {part.bucket: part.metrics for part in parts if part.task == task and part.by == by}


def test_buckets_are_named_by_what_they_hold() -> None:
    assert DISTANCE.names == ("never", "1-64", "65-512", "513-4,096", "4,097-32,768", "32,769+")
    values = np.array([-1, 1, 64, 65, 512, 513, 4096, 4097, 32768, 32769])
    assert DISTANCE.index(values).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert HISTORY_LENGTH.names == ("0", "1-100", "101-1,000", "1,001-10,000", "10,001-100,000", "100,001+")
    assert HISTORY_LENGTH.index(np.array([0, 1, 100, 101, 10**6])).tolist() == [0, 1, 1, 2, 5]


@pytest.mark.parametrize(
    ("by", "low", "high", "column"),
    [("history length", 101, 1000, "num_known"), ("distance", 65, 512, "distance"), ("distance", -1, -1, "distance")],
)
def test_a_slice_is_the_metrics_of_its_impressions(by: str, low: int, high: int, column: str) -> None:
    scored = scored_world(noise=1.0)
    bucket = "never" if high < 0 else f"{low:,}-{high:,}"
    values = getattr(scored, column)
    rows = (values >= low) & (values <= high)
    assert 0 < rows.sum() < len(rows)
    for task, name in enumerate(scored.tasks):
        found = only(all_slices(scored), name, by)[bucket]
        expected = evaluate_task(scored.labels[rows, task], scored.probabilities[rows, task], scored.user[rows])
        assert {key: found[key] for key in expected} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("by", ["history length", "distance"])
def test_slices_part_all_impressions(by: str) -> None:
    scored = scored_world(noise=1.0)
    parts = only(all_slices(scored), "like", by)
    assert sum(metrics["num_impressions"] for metrics in parts.values()) == len(scored.user)
    assert all(metrics["num_impressions"] > 0 for metrics in parts.values())


def small() -> ScoredImpressions:
    """Request 0: positive met 5 events back; request 1: never met; request 2: two positives, 5 and 100 back."""
    return ScoredImpressions(
        ("click",),
        np.array([1, 0, 0, 1, 0, 1, 1, 0], np.int8)[:, None],
        np.array([0.9, 0.8, 0.1, 0.2, 0.3, 0.7, 0.4, 0.6])[:, None],
        user=np.array([0, 0, 0, 0, 0, 1, 1, 1]),
        request=np.array([0, 0, 0, 1, 1, 2, 2, 2]),
        num_known=np.array([10, 10, 10, 20, 20, 200, 200, 200]),
        distance=np.array([5, -1, 100, -1, 5, 5, 100, -1]),
        source=np.array([1, 2, 3, 1, 2, 1, 1, 3], np.int8),
    )


def test_positive_distance_keeps_all_negatives_of_the_positives_requests() -> None:
    parts = only(all_slices(small()), "click", "positive distance")
    assert {bucket: m["num_impressions"] for bucket, m in parts.items()} == {"never": 2, "1-64": 5, "65-512": 2}
    assert {bucket: m["num_positives"] for bucket, m in parts.items()} == {"never": 1, "1-64": 2, "65-512": 1}
    assert parts["never"]["auc"] == 0  # .2 against .3
    assert parts["1-64"]["auc"] == pytest.approx(5 / 6)  # .9, .7 against .8, .1 and .6: all but .7 < .8
    assert parts["65-512"]["auc"] == 0  # .4 against .6


def test_source_sets_all_positives_against_its_negatives() -> None:
    scored = small()
    parts = only(all_slices(scored), "click", "source")
    assert list(parts) == ["popularity", "category"]
    assert [m["num_positives"] for m in parts.values()] == [4, 4]
    assert [m["num_impressions"] for m in parts.values()] == [6, 6]
    rows = (scored.labels[:, 0] == 1) | (scored.source == SOURCES.index("category"))
    assert parts["category"]["auc"] == auc(scored.labels[rows, 0], scored.probabilities[rows, 0])


def test_shown_candidates_are_ranked_where_there_is_one_positive() -> None:
    metrics = small().metrics(0)
    assert metrics["shown_requests"] == 2
    assert metrics["shown_hr@1"] == 0.5
    assert metrics["shown_ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_scored_from_impressions_takes_what_belongs_to_each_row() -> None:
    impressions = Impressions(
        user=np.array([3, 8], np.int32),
        timestamp_us=np.array([1, 2]),
        num_known=np.array([7, 9]),
        offsets=np.array([0, 2, 5]),
        item=np.arange(5, dtype=np.int32),
        label=np.array([[0], [1], [0], [0], [1]], np.int8),
        source=np.array([2, 1, 2, 3, 1], np.int8),
        context=np.zeros((5, 0), np.float32),
    )
    distance = np.array([10, 11, 12, 13, 14])
    scored = ScoredImpressions.of(
        impressions, ["click"], np.array([1, 2, 4]), np.array([[0.1], [0.2], [0.3]]), distance
    )
    assert scored.user.tolist() == [3, 8, 8]
    assert scored.request.tolist() == [0, 1, 1]
    assert scored.num_known.tolist() == [7, 9, 9]
    assert scored.distance.tolist() == [11, 12, 14]
    assert scored.source.tolist() == [1, 2, 1]
    assert scored.labels[:, 0].tolist() == [1, 0, 1]


def test_nothing_scored_has_no_slices() -> None:
    empty = take(scored_world(noise=1.0), np.zeros(0, np.int64))
    assert all_slices(empty) == ()
    assert math.isnan(Evaluation.of("vista", empty).metrics["click"]["ne"])


def test_an_evaluation_survives_json() -> None:
    scored = take(scored_world(noise=1.0), np.arange(300))
    scored = replace(scored, labels=scored.labels * np.array([1, 0], np.int8))  # a task without positives: nan
    curve = ({"step": 10, "validation_ne": 0.9},)
    evaluation = Evaluation.of("vista", scored, {"split": "test", "seed": 1}, curve)
    assert {part.by for part in evaluation.slices} == set(SLICES)
    assert math.isnan(evaluation.metrics["like"]["ne"])
    again = Evaluation.from_json(evaluation.to_json())
    assert again.dumps() == evaluation.dumps()
    assert "NaN" not in evaluation.dumps()
    assert math.isnan(again.metrics["like"]["ne"])
    assert again.metrics["click"] == evaluation.metrics["click"]
    assert again.slice_metrics("click", "distance") == evaluation.slice_metrics("click", "distance") != {}
    assert again.calibration == evaluation.calibration


@pytest.mark.parametrize("values", [{}, {"model": "vista"}, {"model": 1, "metrics": 3}])
def test_what_is_no_evaluation_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(DataError, match="not an evaluation"):
        Evaluation.from_json(values)
