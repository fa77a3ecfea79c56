"""Requests made from events: what may be a candidate, how it is drawn, and that it hangs on nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import vista.data.impressions
from tests.data.small_logs import SECOND_US, START_S, Request, prepared, requests_of, small_log
from vista.data.sort import SortedLog

SIGMAS = 5.0  # of a share that should be near its expectation: one false alarm in a million
ALL_TRAIN = {"validation_fraction": 0.0, "test_fraction": 0.0}


def genres(items: int = 20, kinds: int = 4) -> pl.DataFrame:
    """The items of ``small_log``, every fifth without a genre."""
    number = np.arange(items)
    return pl.DataFrame(
        {"item_id": number + 100, "genre": [None if i % 5 == 4 else f"g{i % kinds}" for i in number.tolist()]}
    )


def identity(request: Request) -> tuple[Any, ...]:
    """Which request it is, apart from its candidates."""
    return request.user, request.time_us, request.positive


def assert_near(count: int, number: int, share: float) -> None:
    """count of number independent draws, each hit with probability ``share``."""
    assert abs(count - number * share) <= SIGMAS * np.sqrt(number * share * (1 - share)) + 1e-9, (count, number, share)


@pytest.mark.parametrize("seed", range(5))
def test_candidates_keep_the_rules(seed: int, tmp_path: Path) -> None:
    log = small_log(seed, events=300, seconds=150)  # many events at equal times
    genre = dict(genres().iter_rows())
    data = prepared(tmp_path, log, items=genres(), popularity_negatives=3, category_negatives=2, seed=seed)
    requests = requests_of(data)
    assert len(requests) > 100
    for request in requests:
        time = request.time_us // SECOND_US
        before = log.filter(pl.col("timestamp") < time)["item_id"].to_list()
        burst = log.filter((pl.col("timestamp") == time) & (pl.col("user_id") == request.user))["item_id"].to_list()
        assert request.positive == burst[0]
        assert request.positive in before  # whose it was does not matter
        assert len(set(request.items)) == len(request.items) >= 2
        assert request.labels == tuple((int(source == "positive"),) for source in request.sources)
        count = Counter(request.sources)
        assert count["positive"] == 1
        assert count["popularity"] <= 3
        assert count["category"] <= (2 if genre[request.positive] is not None else 0)
        for item, source in zip(request.items, request.sources, strict=True):
            assert item in before
            if source != "positive":
                assert item not in burst
            if source == "category":
                assert genre[item] == genre[request.positive]


def test_without_categories_all_negatives_are_from_popularity(tmp_path: Path) -> None:
    requests = requests_of(prepared(tmp_path, small_log(events=300)))
    assert {source for request in requests for source in request.sources} == {"positive", "popularity"}


def test_nobody_is_asked_about_an_item_new_to_everybody(tmp_path: Path) -> None:
    """Item 7 comes up first for user 1, at 60 s; at that very moment user 2 meets it as well."""
    first = pl.DataFrame({"user_id": [1, 2, 3], "item_id": [7, 7, 7], "timestamp": [START_S + t for t in (60, 60, 61)]})
    log = pl.concat([small_log(seconds=50).drop("action"), first])
    data = prepared(tmp_path, log, **ALL_TRAIN)
    about = [request for request in requests_of(data) if request.positive == 7]
    assert [identity(request) for request in about] == [(3, (START_S + 61) * SECOND_US, 7)]
    firsts = log.group_by("item_id").agg(pl.col("timestamp").min())
    starts = log.unique(["user_id", "timestamp"], keep="first", maintain_order=True)
    new = starts.join(firsts, on=["item_id", "timestamp"]).height
    assert data.manifest.statistics["unseen_positive"] == new


def test_a_burst_is_one_request(tmp_path: Path) -> None:
    """By its column, though its events are minutes apart: the first item is the positive, the others are nothing."""
    background = small_log(events=300, seconds=100).with_columns(basket=pl.int_range(1000, 1300)).drop("action")
    baskets = pl.DataFrame(
        {
            "user_id": [1] * 6, "item_id": [105, 106, 107, 108, 105, 109],
            "timestamp": [START_S + t for t in (200, 260, 320, 400, 400, 500)], "basket": [1, 1, 1, 2, 2, 3],
        }
    )  # fmt: skip
    data = prepared(
        tmp_path, pl.concat([background, baskets]), burst_column="basket", popularity_negatives=19, **ALL_TRAIN
    )
    late = [request for request in requests_of(data) if request.time_us >= (START_S + 200) * SECOND_US]
    assert [(r.time_us // SECOND_US - START_S, r.positive) for r in late] == [(200, 105), (400, 108), (500, 109)]
    known = background.filter(pl.col("user_id") == 1).height
    assert [request.num_known for request in late] == [known, known + 3, known + 5]
    for request, others in zip(late, ({106, 107}, {105}, set()), strict=True):
        assert not others & set(request.items)
    assert all(len(request.items) > 12 for request in late)  # 20 items there are; none of them was hard to draw


def many_asked(before: dict[int, int], asked: int, positive: int) -> pl.DataFrame:
    """Some items met so often by user 0, then ``asked`` other users who meet the positive, all at one time."""
    items = [item for item, count in before.items() for _ in range(count)]
    return pl.DataFrame(
        {
            "user_id": [0] * len(items) + list(range(1, asked + 1)), "item_id": items + [positive] * asked,
            "timestamp": [START_S + i for i in range(len(items))] + [START_S + 1000] * asked,
        }
    )  # fmt: skip


def test_popularity_draws_in_proportion_to_earlier_events(tmp_path: Path) -> None:
    """Item 4 is met 5000 times at the moment of the requests and after: too late to count."""
    log = many_asked({1: 60, 2: 30, 3: 10, 5: 1}, 4000, positive=5)
    late = pl.DataFrame(
        {"user_id": [9000] * 5000, "item_id": [4] * 5000, "timestamp": START_S + 1000 + np.arange(5000)}
    )
    data = prepared(tmp_path, pl.concat([log, late]), popularity_negatives=1, keep_duplicates=True, **ALL_TRAIN)
    asked = [request for request in requests_of(data) if request.positive == 5]
    assert len(asked) == 4000
    drawn = Counter(item for request in asked for item in request.items if item != 5)
    assert set(drawn) == {1, 2, 3}
    for item, share in {1: 0.6, 2: 0.3, 3: 0.1}.items():
        assert_near(drawn[item], 4000, share)


def test_category_draws_in_proportion_within_the_category(tmp_path: Path) -> None:
    log = many_asked({1: 30, 2: 10, 3: 60, 5: 1}, 4000, positive=5)
    items = pl.DataFrame({"item_id": [1, 2, 3, 5], "genre": ["a", "a", "b", "a"]})
    options: dict[str, Any] = {"items": items, "popularity_negatives": 0, "category_negatives": 1, **ALL_TRAIN}
    asked = [r for r in requests_of(prepared(tmp_path, log, **options)) if r.positive == 5]
    drawn = Counter(item for request in asked for item in request.items if item != 5)
    assert len(asked) == drawn.total() == 4000
    assert_near(drawn[1], 4000, 0.75)
    assert_near(drawn[2], 4000, 0.25)


@pytest.mark.parametrize("seed", range(3))
def test_history_negatives_are_own_items_last_met_about_as_long_ago_as_the_positive(seed: int, tmp_path: Path) -> None:
    log = small_log(seed, events=600, seconds=300).sort("timestamp", maintain_order=True)
    options: dict[str, Any] = {"history_negatives": 3, "keep_duplicates": True, **ALL_TRAIN}
    data = prepared(tmp_path, log, popularity_negatives=1, seed=seed, **options)
    num_found = num_new = 0
    for request in requests_of(data):
        time = request.time_us // SECOND_US
        own = log.filter((pl.col("user_id") == request.user) & (pl.col("timestamp") < time))["item_id"].to_list()
        distance = {item: len(own) - place for place, item in enumerate(own)}  # the last meeting counts
        burst = log.filter((pl.col("timestamp") == time) & (pl.col("user_id") == request.user))["item_id"].to_list()
        drawn = [i for i, source in zip(request.items, request.sources, strict=True) if source == "history"]
        if request.positive not in distance:
            num_new += 1
            assert not drawn
        for item in drawn:
            assert item not in burst
            assert 0.5 * distance[request.positive] - 1 < distance[item] < 2 * distance[request.positive]
        num_found += len(drawn)
    assert num_found > 100
    assert num_new > 0


def test_history_negatives_are_drawn_evenly_on_the_scale_of_distances(tmp_path: Path) -> None:
    """Item 0 was last met 64 events ago and 200 others, each once, around it: as many nearer as farther."""
    items = [*range(100, 236), 0, *range(300, 363)]
    one = pl.DataFrame({"item_id": [*items, 0], "timestamp": START_S + np.arange(len(items) + 1)})
    log = pl.concat([one.with_columns(user_id=pl.lit(user)) for user in range(1000)])
    data = prepared(tmp_path, log, popularity_negatives=0, history_negatives=1, **ALL_TRAIN)
    last = START_S + len(items)
    drawn = [
        i
        for r in requests_of(data)
        if r.time_us == last * SECOND_US
        for i, source in zip(r.items, r.sources, strict=True)
        if source == "history"
    ]
    distance = len(items) - np.array([items.index(i) for i in drawn])
    assert len(drawn) == 1000
    assert_near(int((distance < 64).sum()), 1000, 0.5)
    assert_near(int((distance < 48).sum()), 1000, np.log2(1.5) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_new_items_leaves_out_whatever_the_user_had_met(seed: int, tmp_path: Path) -> None:
    log = small_log(seed, users=6, items=30, events=400, seconds=300).sort("timestamp", maintain_order=True)
    options: dict[str, Any] = {"keep_duplicates": True, "seed": seed, **ALL_TRAIN}
    everything, new = (prepared(tmp_path, log, new_items=flag, **options) for flag in (False, True))

    def met(request: Request) -> set[int]:
        time = request.time_us // SECOND_US
        return set(log.filter((pl.col("user_id") == request.user) & (pl.col("timestamp") < time))["item_id"])

    known = [request.positive in met(request) for request in requests_of(everything)]
    assert any(met(request) & set(request.items) for request in requests_of(everything))
    assert 0 < sum(known) == new.manifest.statistics["met_positive"]
    found = requests_of(new)
    assert len(found) + new.manifest.statistics["without_negative"] == len(known) - sum(known)
    assert not any(met(request) & set(request.items) for request in found)
    assert any(met(request) for request in found)


def test_the_place_of_the_positive_says_nothing(tmp_path: Path) -> None:
    log = many_asked(dict.fromkeys(range(1, 40), 10) | {50: 1}, 4000, positive=50)
    requests = [r for r in requests_of(prepared(tmp_path, log, **ALL_TRAIN)) if r.positive == 50]
    places = Counter(request.items.index(50) for request in requests)
    assert {len(request.items) for request in requests} == {5}
    for place in range(5):
        assert_near(places[place], 4000, 0.2)


def test_seeds_draw_other_negatives_for_the_same_requests(tmp_path: Path) -> None:
    log = small_log(events=300)
    first, again, other = (requests_of(prepared(tmp_path, log, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [identity(request) for request in first] == [identity(request) for request in other]
    assert {request.positive for request in first} == {request.positive for request in other}


def test_draws_hang_on_nothing_but_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on later events, on partitions, or on how much is worked on at a time."""
    log = small_log(events=400)
    border = START_S + 250
    past = log.filter(pl.col("timestamp") < border)
    options: dict[str, Any] = {"items": genres(), "history_negatives": 2, **ALL_TRAIN}
    both = [requests_of(prepared(tmp_path, frame, **options)) for frame in (log, past)]
    whole, alone = ([r for r in requests if r.time_us < border * SECOND_US] for requests in both)
    drawn = [(identity(request), request.items, request.sources) for request in whole]
    assert drawn == [(identity(request), request.items, request.sources) for request in alone]
    monkeypatch.setattr(vista.data.impressions, "CHUNK_ROWS", 7)
    monkeypatch.setattr(SortedLog.chunks, "__defaults__", (30,))
    pieces = prepared(tmp_path, past, events_per_partition=3, **options)
    assert requests_of(pieces) == alone


def test_max_requests_takes_some_of_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = small_log(events=600)
    options = {"validation_from": "2030-01-01"}
    everything = {identity(request): request for request in requests_of(prepared(tmp_path, log, **options))}
    data = prepared(tmp_path, log, max_requests=60, **options)
    some = requests_of(data)
    assert len(some) == 60
    assert data.manifest.statistics["over_max_requests"] == len(everything) - 60
    assert all(everything[identity(request)] == request for request in some)
    monkeypatch.setattr(SortedLog.chunks, "__defaults__", (30,))  # so that it is thinned out again and again
    assert requests_of(prepared(tmp_path, log, max_requests=60, **options)) == some


def test_max_requests_is_a_uniform_sample(tmp_path: Path) -> None:
    """Over seeds each request is taken equally often, whoever's it is and whenever it was made."""
    log = small_log(events=300)
    total = len(requests_of(prepared(tmp_path, log, **ALL_TRAIN)))
    seeds, taken = 60, Counter[tuple[Any, ...]]()
    for seed in range(seeds):
        sample = requests_of(prepared(tmp_path, log, max_requests=total // 4, seed=seed, **ALL_TRAIN))
        taken.update(map(identity, sample))
    share = (total // 4) / total
    assert len(taken) == total
    for count in taken.values():
        assert_near(count, seeds, share)
    expected = seeds * share
    chi_square = sum((count - expected) ** 2 / (expected * (1 - share)) for count in taken.values())
    assert abs(chi_square - total) <= SIGMAS * np.sqrt(2 * total)


def test_a_request_without_a_negative_is_none(tmp_path: Path) -> None:
    """At 1 s all that had happened was item 1; at 3 s there is item 2 to compare with."""
    log = pl.DataFrame({"user_id": [1, 1, 1, 1], "item_id": [1, 1, 2, 1], "timestamp": START_S + np.arange(4)})
    data = prepared(tmp_path, log, **ALL_TRAIN)
    (request,) = requests_of(data)
    assert identity(request) == (1, (START_S + 3) * SECOND_US, 1)
    assert data.manifest.statistics["without_negative"] == 1
    assert data.manifest.statistics["unseen_positive"] == 2
