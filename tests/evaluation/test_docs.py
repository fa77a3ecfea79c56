"""docs/metrics.md names what the code measures, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tests.evaluation.worlds import scored_world
from vista.data.counts import HALF_LIVES_S, NEVER_EVENTS, NEVER_S
from vista.evaluation.metrics import LEAST_PROBABILITY, ranking_metrics
from vista.evaluation.slices import DISTANCE, HISTORY_LENGTH, SLICES
from vista.schema import SOURCES

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    sections = {text.split("\n")[0]: text for text in re.split(r"^## ", DOCS, flags=re.M)}
    return sections[title]


def first_column(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_explained() -> None:
    measured = set(scored_world(1.0).metrics(0)) | {"hr@10", "ndcg@10"}
    text = section("Metrics, per task")
    explained = first_column(text) | set(re.findall(r"positive: `(\w+)`", text))
    assert explained == measured
    assert {"hr@10", "ndcg@10"} < set(ranking_metrics(np.array([1])))
    assert f"{LEAST_PROBABILITY:.1e}" in DOCS


def test_every_slice_and_bucket_is_explained() -> None:
    text = section("Slices")
    assert first_column(text) - {"by"} == set(SLICES)
    assert ", ".join(HISTORY_LENGTH.names) in text
    assert ", ".join([*DISTANCE.names[1:], DISTANCE.names[0]]) in text
    assert ", ".join(SOURCES) in text


def test_every_count_feature_is_explained() -> None:
    text = section("Counts")
    half_lives = ", ".join(f"`_{name}`" for name in list(HALF_LIVES_S)[1:])
    assert f"`<level>_count_{next(iter(HALF_LIVES_S))}`, {half_lives}" in text
    for name in ("met", "count", "events_since", "seconds_since", "popularity_share"):
        assert f"`<level>_{name}`" in text
    assert f"log of {NEVER_EVENTS:.0e} events, of {NEVER_S:.0e} seconds".replace("e+0", "e").replace("e+", "e") in text
