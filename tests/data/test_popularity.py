"""Popularity: both forms beside a definition in plain loops; of what comes after its table a request knows nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.models.worlds import NUM_ITEMS, catalogue
from vista.data.histories import Histories, Impressions
from vista.data.popularity import (
    NEVER_S,
    US_PER_HOUR,
    WINDOWS_S,
    Popularity,
    PopularityFeatures,
    popularity_names,
    popularity_table,
)

CATALOGUE = catalogue()
KEYS = [None, *CATALOGUE.features.T]  # of the item and its categories
START_US = 10**15
US_PER_DAY = 24 * US_PER_HOUR


def log(seed: int, num_events: int = 300) -> Histories:
    rng = np.random.default_rng(seed)
    time_us = START_US + np.sort(rng.integers(0, 700, num_events)) * US_PER_DAY  # many at the same time
    item = rng.integers(1, NUM_ITEMS, num_events).astype(np.int32)
    offsets = np.array([0, num_events])
    return Histories(offsets=offsets, item=item, action=np.zeros(num_events, np.int16), timestamp_us=time_us)


def naive(histories: Histories, item: int, at_us: int) -> list[float]:
    values: list[float] = []
    ages_of_all = [at_us - int(t) for t in histories.timestamp_us if t < at_us]
    for key in KEYS:
        keys = np.arange(CATALOGUE.num_indices) if key is None else key
        met = [
            int(t)
            for i, t in zip(histories.item, histories.timestamp_us, strict=True)
            if keys[item] > 0 and keys[i] == keys[item] and t < at_us
        ]
        since = (at_us - max(met)) / 1e6 if met else NEVER_S
        ever = (len(met) + 1) / (len(ages_of_all) + 1)
        within = []
        for window_s in WINDOWS_S.values():
            num, of = (sum(age <= window_s * 1e6 for age in ages) for ages in ([at_us - t for t in met], ages_of_all))
            within.append(math.log((num + 1) / (of + 1 / ever)))
        age = (at_us - min(met)) / 1e6 if met else 0
        values += [math.log(ever), math.log1p(since), math.log1p(age), *within]
    return values


@pytest.mark.parametrize("day", [0, 1, 350, 2000])
def test_both_forms_say_what_the_definition_says(day):
    histories, at_us = log(seed=day), START_US + day * US_PER_DAY
    items = np.arange(CATALOGUE.num_indices)
    expected = np.array([naive(histories, item, at_us) for item in items.tolist()])
    at = np.full(len(items), at_us)
    found = np.concatenate([Popularity.of(histories, key).features(items, at) for key in KEYS], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(popularity_table(histories, CATALOGUE, at_us), found, rtol=1e-6)


def test_traffic_that_doubles_leaves_popularity_where_it_was():
    """Every event of the last year twice: the shares within it stay, but for the one event that each has more."""
    once, at_us = log(seed=3, num_events=20_000), START_US + 700 * US_PER_DAY
    copies = np.where(once.timestamp_us >= at_us - 365 * US_PER_DAY, 2, 1)
    twice = Histories(
        offsets=np.array([0, copies.sum()]), item=np.repeat(once.item, copies),
        action=np.zeros(copies.sum(), np.int16), timestamp_us=np.repeat(once.timestamp_us, copies),
    )  # fmt: skip
    before, after = (popularity_table(histories, CATALOGUE, at_us) for histories in (once, twice))
    windows = [place for place, name in enumerate(popularity_names(CATALOGUE)) if name.endswith(("_30d", "_1y"))]
    has_events = before[:, windows] > math.log(1 / 1000)  # else all it has is the one event more
    assert has_events.any()
    np.testing.assert_allclose(after[:, windows][has_events], before[:, windows][has_events], atol=0.05)


def test_a_request_reads_the_last_table_before_it():
    """Events between the table and the request change nothing; the table of all items has the same rows."""
    histories, period = log(seed=5), 30
    asked_us = (START_US // (period * US_PER_DAY) + 12) * period * US_PER_DAY + 17 * US_PER_DAY
    impressions = Impressions(
        user=np.zeros(1, np.int32), timestamp_us=np.array([asked_us]), num_known=np.array([0]),
        offsets=np.array([0, 6]), item=np.arange(1, 7, dtype=np.int32), label=np.zeros((6, 1), np.float32),
        context=np.zeros((6, 0), np.float32), source=np.zeros(6, np.int8),
    )  # fmt: skip
    earlier = histories.timestamp_us < asked_us - 17 * US_PER_DAY
    known = Histories(
        offsets=np.array([0, earlier.sum()]), item=histories.item[earlier], action=histories.action[earlier],
        timestamp_us=histories.timestamp_us[earlier],
    )  # fmt: skip
    found, alone = (
        PopularityFeatures.of(SimpleNamespace(histories=h, catalogue=CATALOGUE), impressions, 24 * period)  # type: ignore[arg-type]
        for h in (histories, known)
    )
    assert 0 < earlier.sum() < len(earlier)
    np.testing.assert_array_equal(found.matrix, alone.matrix)
    np.testing.assert_array_equal(found.of_all_items(asked_us)[1:7], found.matrix)
