"""Counts equal a brute force over the raw events, and nothing at or after a request is counted."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.catalogue import Catalogue
from vista.data import counts
from vista.data.counts import (
    HALF_LIVES_S,
    NEVER,
    NEVER_EVENTS,
    NEVER_S,
    PRECEDING_NAMES,
    CountFeatures,
    count_features,
    last_met,
)
from vista.data.histories import Histories, Impressions
from vista.data.popularity import NAMES, WINDOWS_S
from vista.errors import ConfigError

NUM_ITEMS = 6
CATALOGUE = Catalogue(
    ids=np.arange(NUM_ITEMS),
    embedding_row=np.arange(NUM_ITEMS + 2, dtype=np.int32),
    num_unknown_buckets=1,
    features=np.array([[0, 0], [0, 0], [1, 1], [1, 2], [2, 1], [2, 2], [0, 1], [3, 0]], np.int32),
    feature_names=("category", "brand"),
    feature_values=(("a", "b", "c"), ("x", "y")),
)
LEVELS = {"item": np.arange(NUM_ITEMS + 2), "category": CATALOGUE.features[:, 0], "brand": CATALOGUE.features[:, 1]}
SECOND = 1_000_000
MAX_GAP_S = 40 * 86_400  # so that every half-life matters


def world(lengths: list[int], seed: int, max_requests: int = 3) -> tuple[Histories, Impressions]:
    """Random histories with repeated timestamps, and requests at, between and after the events' timestamps."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    gaps = rng.integers(0, MAX_GAP_S, total) * rng.integers(0, 2, total) * SECOND
    starts = [10**15 + np.cumsum(gaps[a:b]) for a, b in itertools.pairwise(offsets)]
    times = np.concatenate(starts).astype(np.int64)
    histories = Histories(
        offsets,
        rng.integers(1, NUM_ITEMS + 2, total).astype(np.int32),
        np.zeros(total, np.int16),
        times,
    )
    rows: list[tuple[int, int, int]] = []
    for user in range(len(lengths)):
        mine = histories.timestamp_us[offsets[user] : offsets[user + 1]]
        moments = np.concatenate([[10**15], mine, mine + SECOND]) if len(mine) else np.array([10**15])
        chosen = np.sort(rng.choice(moments, rng.integers(0, max_requests + 1))).tolist()
        rows += [(user, moment, int((mine < moment).sum())) for moment in chosen]
    user, moment, known = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    sizes = rng.integers(1, 4, len(rows))
    num = int(sizes.sum())
    return histories, Impressions(
        user.astype(np.int32),
        moment,
        known,
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rng.integers(0, NUM_ITEMS + 2, num).astype(np.int32),
        np.zeros((num, 1), np.int8),
        np.zeros(num, np.int8),
        np.zeros((num, 0), np.float32),
    )


def brute_force(
    histories: Histories, shown: Impressions, last_events: int | None, num_predecessors: int = 0
) -> list[dict[str, float]]:
    """The definition, event by event, told from timestamps alone (``num_known`` is not read)."""
    out = []
    events = [
        (user, int(histories.item[e]), int(histories.timestamp_us[e]))
        for user in range(histories.num_users)
        for e in range(int(histories.offsets[user]), int(histories.offsets[user + 1]))
    ]
    for request in range(shown.num_requests):
        now = int(shown.timestamp_us[request])
        known = [(item, when) for user, item, when in events if user == shown.user[request] and when < now]
        known = known if last_events is None else known[-last_events:]
        for candidate in shown.item[shown.offsets[request] : shown.offsets[request + 1]]:
            different = len({item for item, _ in known})
            values = {
                "history_length": math.log1p(len(known)),
                "history_items": math.log1p(different),
                "history_repeats": 1 - different / max(len(known), 1),
            }
            for level, keys in LEVELS.items():
                values |= one_level(known, now, int(candidate), level, keys)
                ages = [now - t for _, item, t in events if t < now and keys[item] == keys[candidate] != 0]
                everything = [now - t for _, _, t in events if t < now]
                ever = (len(ages) + 1) / (len(everything) + 1)
                of_all = [math.log(ever), math.log1p(min(ages) / 1e6 if ages else NEVER_S)]
                of_all.append(math.log1p(max(ages, default=0) / 1e6))
                for window_s in WINDOWS_S.values():
                    num, of = (sum(age <= window_s * 1e6 for age in some) for some in (ages, everything))
                    of_all.append(math.log((num + 1) / (of + 1 / ever)))
                values |= {f"{level}_{name}": x for name, x in zip(NAMES, of_all, strict=True)}
            if num_predecessors:
                values |= preceding([item for item, _ in known], int(candidate), num_predecessors)
            out.append(values)
    return out


def preceding(items: list[int], candidate: int, num_kept: int) -> dict[str, float]:
    """How near the items before the newest meetings are among the newest 16 events; the oldest event has none."""
    places = [place for place, item in enumerate(items) if item == candidate != 0][::-1][:num_kept]
    worth = []
    for place in places:
        before = items[place - 1] if place else candidate
        ages = [age for age, item in enumerate(items[::-1][:16]) if item == before != candidate]
        worth.append(max((2 ** (-age / 4) for age in ages), default=0.0))
    values = [sum(worth) / len(worth), max(worth), worth[0]] if worth else [0.0] * 3
    return dict(zip(PRECEDING_NAMES, values, strict=True))


def one_level(known: list[tuple[int, int]], now: int, candidate: int, level: str, keys: np.ndarray) -> dict[str, float]:
    met = [
        (len(known) - place, (now - when) / 1e6)
        for place, (item, when) in enumerate(known)
        if keys[item] == keys[candidate] != 0
    ]
    events, seconds = met[-1] if met else (NEVER_EVENTS, NEVER_S)
    decayed = {
        f"{level}_count_{name}": math.log1p(sum(2 ** (-age / half_life) for _, age in met))
        for name, half_life in HALF_LIVES_S.items()
    }
    return {
        f"{level}_met": float(bool(met)),
        f"{level}_count": math.log1p(len(met)),
        f"{level}_events_since": math.log1p(events),
        f"{level}_seconds_since": math.log1p(seconds),
    } | decayed


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    last_events=st.sampled_from([None, 1, 3, 10, 1000]),
    num_predecessors=st.sampled_from([0, 1, 3]),
)
def test_features_equal_brute_force(
    lengths: list[int], seed: int, last_events: int | None, num_predecessors: int
) -> None:
    histories, shown = world(lengths, seed)
    found = count_features(histories, CATALOGUE, shown, last_events, num_predecessors)
    expected = brute_force(histories, shown, last_events, num_predecessors)
    assert found.matrix.shape == (shown.num_impressions, len(found.feature_names))
    assert found.matrix.dtype == np.float32
    for row, values in zip(found.matrix, expected, strict=True):
        assert set(values) == set(found.feature_names)
        np.testing.assert_allclose(row, [values[name] for name in found.feature_names], rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 25), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_last_met_equals_brute_force(lengths: list[int], seed: int) -> None:
    histories, shown = world(lengths, seed)
    expected: list[int] = []
    for request in range(shown.num_requests):
        start = histories.offsets[shown.user[request]]
        items = histories.item[start : start + shown.num_known[request]].tolist()[::-1]
        candidates = shown.item[shown.offsets[request] : shown.offsets[request + 1]].tolist()
        expected += [items.index(item) + 1 if item in items else NEVER for item in candidates]
    assert last_met(histories, shown).tolist() == expected


def one_request(items: list[int], times_s: list[int], now_s: int, candidate: int) -> tuple[Histories, Impressions]:
    times = np.array(times_s, np.int64) * SECOND
    histories = Histories(np.array([0, len(items)]), np.array(items, np.int32), np.zeros(len(items), np.int16), times)
    return histories, Impressions(
        np.array([0], np.int32),
        np.array([now_s * SECOND]),
        np.array([(times < now_s * SECOND).sum()]),
        np.array([0, 1]),
        np.array([candidate], np.int32),
        np.zeros((1, 1), np.int8),
        np.zeros(1, np.int8),
        np.zeros((1, 0), np.float32),
    )


def named(features: CountFeatures) -> dict[str, float]:
    return dict(zip(features.feature_names, features.matrix[0].tolist(), strict=True))


def test_event_at_the_time_of_the_request_is_not_counted() -> None:
    histories, shown = one_request([2, 2, 2], [10, 20, 30], now_s=30, candidate=2)
    values = named(count_features(histories, CATALOGUE, shown))
    for name in ("item_count", "category_count", "history_length"):
        assert values[name] == pytest.approx(math.log1p(2)), name
    assert values["item_popularity_share"] == pytest.approx(0)  # all of what was before: the third is not
    assert values["item_events_since"] == pytest.approx(math.log1p(1))
    assert values["item_seconds_since"] == pytest.approx(math.log1p(10))


def test_changing_the_future_changes_nothing() -> None:
    histories, shown = world([30, 20, 10], seed=3)
    # only requests before this moment; then every event from it on becomes another item
    moment = int(np.median(shown.timestamp_us))
    early = np.repeat(shown.timestamp_us, np.diff(shown.offsets)) <= moment
    changed = replace(histories, item=np.where(histories.timestamp_us >= moment, 7, histories.item).astype(np.int32))
    assert (changed.item != histories.item).any()
    assert early.any()
    before, after = (count_features(h, CATALOGUE, shown).matrix for h in (histories, changed))
    np.testing.assert_array_equal(before[early], after[early])
    assert (before[~early] != after[~early]).any()


def test_empty_history_has_designed_values() -> None:
    histories, shown = one_request([], [], now_s=5, candidate=3)
    values = named(count_features(histories, CATALOGUE, shown))
    assert values["history_length"] == values["item_count"] == values["item_met"] == 0
    assert values["item_popularity_share"] == values["item_popularity_share_30d"] == 0  # one of one
    assert values["item_events_since"] == pytest.approx(math.log1p(NEVER_EVENTS))
    assert values["category_seconds_since"] == pytest.approx(math.log1p(NEVER_S), rel=1e-6)
    assert last_met(histories, shown).tolist() == [NEVER]


def test_cut_forgets_what_is_older_than_the_last_events() -> None:
    histories, shown = one_request([2, 3, 3], [10, 20, 30], now_s=40, candidate=2)
    values = named(count_features(histories, CATALOGUE, shown, last_events=2))
    assert values["item_met"] == values["item_count"] == values["item_count_1y"] == 0
    assert values["item_events_since"] == pytest.approx(math.log1p(NEVER_EVENTS))
    assert values["category_count"] == pytest.approx(math.log1p(2))  # item 3 is of the same category
    assert values["history_length"] == pytest.approx(math.log1p(2))
    assert values["item_popularity_share"] == pytest.approx(math.log(2 / 4))


def test_short_cut_of_a_long_group_keeps_its_precision() -> None:
    """Ten thousand old meetings are subtracted from a sum of which only three remain."""
    n, now = 10_000, 20_000
    histories, shown = one_request([2] * n, list(range(n)), now_s=now, candidate=2)
    values = named(count_features(histories, CATALOGUE, shown, last_events=3))
    for name, half_life in HALF_LIVES_S.items():
        exact = math.log1p(sum(2 ** (-(now - t) / half_life) for t in (n - 1, n - 2, n - 3)))
        assert values[f"item_count_{name}"] == pytest.approx(exact, rel=1e-6), name


def test_a_value_that_is_not_known_is_never_met() -> None:
    histories, shown = one_request([6, 6], [10, 20], now_s=40, candidate=6)  # item 6 has no category
    values = named(count_features(histories, CATALOGUE, shown))
    assert values["item_count"] == pytest.approx(math.log1p(2))
    assert values["category_count"] == values["category_met"] == 0
    assert values["category_popularity_share"] == pytest.approx(math.log(1 / 3))
    padding = named(count_features(*replace_item(histories, shown, 0)))
    assert padding["item_met"] == 0
    assert padding["item_popularity_share"] == pytest.approx(math.log(1 / 3))


def replace_item(histories: Histories, shown: Impressions, item: int) -> tuple[Histories, Catalogue, Impressions]:
    return histories, CATALOGUE, replace(shown, item=np.full_like(shown.item, item))


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    histories, shown = world([20, 0, 15, 30, 7, 3], seed=11, max_requests=9)
    whole, distance = count_features(histories, CATALOGUE, shown, None, 3).matrix, last_met(histories, shown)
    monkeypatch.setattr(counts, "BLOCK_ROWS", 25)
    blocks = list(counts.request_blocks(histories, shown))
    assert len(blocks) > 2
    assert [first for first, _ in blocks[1:]] == [end for _, end in blocks[:-1]]
    np.testing.assert_array_equal(count_features(histories, CATALOGUE, shown, None, 3).matrix, whole)
    np.testing.assert_array_equal(last_met(histories, shown), distance)


def test_called_with_rows_it_gives_their_features() -> None:
    histories, shown = world([20, 15], seed=5)
    features = count_features(histories, CATALOGUE, shown)
    rows = np.array([2, 0])
    np.testing.assert_array_equal(features(np.array([0, 0]), rows), features.matrix[rows])


def test_no_requests_no_rows() -> None:
    histories, shown = world([5], seed=0)
    empty = replace(
        shown,
        **{name: getattr(shown, name)[:0] for name in ("user", "timestamp_us", "num_known", "item")},
        offsets=np.zeros(1, np.int64),
    )
    assert len(count_features(histories, CATALOGUE, empty).matrix) == 0
    assert len(last_met(histories, empty)) == 0


def test_cut_of_no_events_is_refused() -> None:
    with pytest.raises(ConfigError, match="last_events is 0"):
        count_features(*replace_item(*world([5], seed=0), 2), last_events=0)


@pytest.mark.parametrize(("num_users", "length"), [(3, 100_000), (30_000, 10)])
def test_long_and_many_histories_are_both_quick(num_users: int, length: int) -> None:
    """300,000 events and 300,000 impressions: a loop over events or users would take minutes."""
    rng = np.random.default_rng(0)
    total, num_requests = num_users * length, 30_000
    times = np.sort(rng.integers(10**15, 10**15 + 10**13, (num_users, length)), 1)
    offsets = np.arange(num_users + 1) * length
    histories = Histories(
        offsets, rng.integers(1, NUM_ITEMS + 2, total).astype(np.int32), np.zeros(total, np.int16), times.ravel()
    )
    user = np.sort(rng.integers(0, num_users, num_requests))
    known = rng.integers(0, length, num_requests)
    shown = Impressions(
        user.astype(np.int32),
        times[user, known],
        known,
        np.arange(num_requests + 1) * 10,
        rng.integers(1, NUM_ITEMS + 2, num_requests * 10).astype(np.int32),
        np.zeros((num_requests * 10, 1), np.int8),
        np.zeros(num_requests * 10, np.int8),
        np.zeros((num_requests * 10, 0), np.float32),
    )
    started = time.process_time()
    last_met(histories, shown)
    met_s = time.process_time() - started
    count_features(histories, CATALOGUE, shown)
    assert met_s < 3
    assert time.process_time() - started < 15
