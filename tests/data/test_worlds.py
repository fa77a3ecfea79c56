"""Synthetic worlds: the promised score is the formula of the history, recomputed event by event from the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

from vista.cli.data import app
from vista.data.worlds import WORLDS, WorldOptions, make_world, write_world
from vista.data.worlds.base import ACTIONS, Counter, Log, Requests, draw_distinct
from vista.data.worlds.best import cell_means, expected
from vista.data.worlds.membership import Membership
from vista.data.worlds.write import draw_user
from vista.errors import ConfigError, StaleOutput

SMALL: dict[str, dict[str, Any]] = {
    "needle": {"min_age": 5, "likes": 4},
    "repetition": {"min_age": 5, "likes": 4},
    "membership": {"p_hit": 0.8, "p_miss": 0.2},
    "membership of categories": {"by_category": True, "touched": 8, "zipf": 2.0, "recent_events": 16},
    "drift": {"phase_events": 40},
    "lifelong": {"phase_events": 40, "likes": 8},
    "counting": {"touched": 40, "recent_events": 64},
    "counting of categories": {"by_category": True, "touched": 30, "recent_events": 64},
    "periodic": {"returning": 12, "min_period": 20, "max_period": 60, "recent_events": 64},
    "periodic of categories": {"by_category": True, "returning": 8, "min_period": 20, "max_period": 60,
                               "recent_events": 64},
    "dislike": {"opinions": 60, "recent_events": 64},
}  # fmt: skip
CASES = sorted(SMALL)  # a world's name, perhaps followed by what is special about the case
NAMES = sorted({case.split()[0] for case in CASES})
Events = list[tuple[int, int, int, str]]  # time, item, category, action of one user, oldest first


def small(case: str, **sizes: Any) -> WorldOptions:
    settings = SMALL[case] | sizes.pop("settings", {})
    return WorldOptions(**{"users": 6, "events": 300, "requests": 16, "seed": 3} | sizes, settings=settings)


@dataclass(frozen=True)
class Tables:
    """What a world's folder holds."""

    events: pl.DataFrame
    items: pl.DataFrame
    impressions: pl.DataFrame
    details: pl.DataFrame
    described: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Tables:
        tables = (pl.read_parquet(folder / f"{name}.parquet") for name in ("events", "items", "impressions", "details"))
        return cls(*tables, json.loads((folder / "world.json").read_text()))

    def history(self, user: int) -> Events:
        category = dict(self.items.iter_rows())
        rows = self.events.filter(pl.col("user_id") == user).sort("timestamp").iter_rows()
        return [(time, item, category[item], action) for _, item, time, action in rows]


@pytest.fixture(scope="module", params=CASES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("worlds") / request.param
    write_world(request.param.split()[0], folder, small(request.param))
    return Tables.read(folder)


# --- the formulas, once more and as plainly as can be


def needle_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    return p["p_hit"] if any(a == "like" and c == category for _, _, c, a in before) else p["p_miss"]


def membership_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    is_touched = any(c == category if p["by_category"] else i == item for _, i, c, _ in before)
    return p["p_hit"] if is_touched else p["p_miss"]


def drift_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    return 1 / (1 + math.exp(-drift_logit(before, category, p)))


def drift_logit(before: Events, category: int, p: dict[str, Any]) -> float:
    share = sum(c == category for _, _, c, _ in before) / len(before)
    recent = sum(c == category for _, _, c, _ in before[-p["recent_taste_events"] :])
    taste = min(max((share - p["low_share"]) / (p["high_share"] - p["low_share"]), 0), 1)
    return p["bias"] + p["lifelong_weight"] * taste + p["recent_weight"] * min(1, recent / p["recent_full_count"])


def lifelong_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    is_liked = any(a == "like" and c == category for _, _, c, a in before)
    return 1 / (1 + math.exp(-drift_logit(before, category, p) - p["like_weight"] * is_liked))


def counting_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    count = sum(c == category if p["by_category"] else i == item for _, i, c, _ in before)
    return 1 / (1 + math.exp(-p["bias"] - p["weight"] * math.log2(1 + count)))


def periodic_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    places = [n for n, (_, i, c, _) in enumerate(before) if (c == category if p["by_category"] else i == item)]
    if len(places) < 2:
        return p["p_miss"]
    gap, age = places[-1] - places[-2], len(before) - places[-1]
    return p["p_hit"] if abs(age - gap) <= p["tolerance"] * gap else p["p_miss"]


def dislike_score(before: Events, item: int, category: int, p: dict[str, Any]) -> float:
    opinions = [a for _, _, c, a in before if c == category and a != "view"]
    return p["p_hit"] if opinions[-1:] == ["like"] else p["p_miss"]


FORMULAS: dict[str, Callable[[Events, int, int, dict[str, Any]], float]] = {
    "needle": needle_score, "repetition": needle_score, "membership": membership_score,
    "drift": drift_score, "lifelong": lifelong_score,
    "counting": counting_score, "periodic": periodic_score, "dislike": dislike_score,
}  # fmt: skip


def test_best_score_is_the_formula_of_the_history(world: Tables) -> None:
    formula, category = FORMULAS[world.described["name"]], dict(world.items.iter_rows())
    histories = {user: world.history(user) for user in world.events["user_id"].unique()}
    assert len(world.impressions) > 150
    for user, item, time, _, best_score in world.impressions.iter_rows():
        before = [event for event in histories[user] if event[0] < time]
        assert best_score == pytest.approx(formula(before, item, category[item], world.described["parameters"]))
    assert world.impressions["best_score"].n_unique() > 1


def test_every_world_is_tested_and_described(world: Tables) -> None:
    assert set(WORLDS) == set(NAMES)
    text = (Path(__file__).parents[2] / "docs" / "worlds.md").read_text()
    assert f"`{world.described['name']}`" in text
    for setting in world.described["parameters"]:
        assert f"`{setting}`" in text, f"docs/worlds.md lacks the setting {setting}"


def test_tables_have_the_promised_columns_and_sizes(world: Tables) -> None:
    parameters = world.described["parameters"]
    assert world.events.schema == {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64, "action": pl.String}
    assert world.items.columns == ["item_id", "category"]
    assert world.impressions.columns == ["user_id", "item_id", "timestamp", "click", "best_score"]
    assert world.events["user_id"].value_counts()["count"].to_list() == [300] * 6
    assert len(world.items) == parameters["items"]
    assert world.items["category"].n_unique() == parameters["categories"]
    assert world.impressions["click"].unique().sort().to_list() == [0, 1]
    assert world.described["num_impressions"] == len(world.impressions) == len(world.details)
    assert set(world.impressions["item_id"]) | set(world.events["item_id"]) <= set(world.items["item_id"])
    keys = ["user_id", "item_id", "timestamp"]
    assert world.details.select(keys).equals(world.impressions.select(keys))
    assert world.impressions.select(keys).is_unique().all()


def test_times_are_strictly_increasing_and_requests_lie_between_events(world: Tables) -> None:
    gaps = world.events.select(gap=pl.col("timestamp").diff().over("user_id")).drop_nulls()["gap"]
    assert gaps.min() >= 2
    assert gaps.quantile(0.9) > 5 * gaps.quantile(0.5)  # sessions and pauses, no metronome
    events = set(world.events.select("user_id", "timestamp").iter_rows())
    assert not events & set(world.impressions.select("user_id", "timestamp").iter_rows())
    edges = world.events.group_by("user_id").agg(first=pl.col("timestamp").min(), last=pl.col("timestamp").max())
    both = world.impressions.join(edges, on="user_id")
    assert (both["timestamp"] > both["first"]).all()
    assert (both["timestamp"] < both["last"]).all()
    period_s = edges["last"].max() - edges["first"].min()
    assert (edges["last"] - edges["first"]).min() > 0.9 * period_s  # all users live at the same time


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_makes_the_same_files_and_another_one_does_not(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(name, tmp_path / folder, small(name, seed=seed))
    for file in ("events.parquet", "items.parquet", "impressions.parquet", "details.parquet", "world.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    events = [pl.read_parquet(tmp_path / folder / "events.parquet") for folder in "ac"]
    assert not events[0].equals(events[1])


@pytest.mark.parametrize("name", NAMES)
def test_more_users_leave_the_others_as_they_were(name: str) -> None:
    few, many = (make_world(name, small(name, users=users)) for users in (2, 20))
    for user in range(2):
        a, b = draw_user(few, user), draw_user(many, user)
        assert np.array_equal(a.log.item, b.log.item)
        assert np.array_equal(a.best_score, b.best_score)
        assert np.array_equal(a.request_s, b.request_s)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_future_changes_no_earlier_score(name: str) -> None:
    world = make_world(name, small(name))
    for user in range(4):
        part = draw_user(world, user)
        for place in (60, 150, 290):
            past = part.requests.num_known <= place
            requests = Requests(part.requests.num_known[past], part.requests.item[past])
            rng = np.random.default_rng(place)
            item = np.append(part.log.item[:place], rng.integers(world.items, size=300 - place))
            action = np.append(part.log.action[:place], rng.integers(1, len(ACTIONS), size=300 - place))
            changed = world.best_score(Log(item, world.category_of(item), action), requests)
            assert np.array_equal(changed, part.best_score[past])


@pytest.mark.parametrize("name", NAMES)
def test_clicks_come_as_often_as_promised(name: str, tmp_path: Path) -> None:
    write_world(name, tmp_path / name, small(name, users=80))
    shown = pl.read_parquet(tmp_path / name / "impressions.parquet")
    by_score = shown.with_columns(pl.col("best_score").round(1).alias("tenth")).group_by("tenth")
    num_checked = 0
    for _, part in by_score:
        p, label = part["best_score"].to_numpy(), part["click"].to_numpy()
        if len(p) > 100:
            num_checked += 1
            assert abs(label.mean() - p.mean()) < 4 * math.sqrt((p * (1 - p)).sum()) / len(p) + 1e-9
    assert num_checked >= 2


def weighted_by_sklearn(truth: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """NE and AUC of ``score`` when each impression is a positive of weight p and a negative of weight 1 - p."""
    labels = np.repeat([1, 0], len(truth))
    weights = np.concatenate([truth, 1 - truth])
    both = np.concatenate([score, score])
    base = np.full(len(both), truth.mean())
    loss, entropy = (log_loss(labels, s, sample_weight=weights) for s in (both, base))
    return loss / entropy, roc_auc_score(labels, both, sample_weight=weights)


def test_the_best_possible_scores_are_those_of_sklearn(world: Tables) -> None:
    truth = world.impressions["best_score"].to_numpy()
    scores = world.described["tasks"]["click"]
    recent = world.details["recent_only_score"].to_numpy()
    for name, score in (("best", truth), ("recent_only_best", recent)):
        ne, auc = weighted_by_sklearn(truth, score)
        assert scores[name]["ne"] == pytest.approx(ne)
        assert scores[name]["auc"] == pytest.approx(auc)
    assert scores["mean_score"] == pytest.approx(truth.mean())
    assert scores["click_rate"] == pytest.approx(world.impressions["click"].mean())


def test_less_history_never_helps(world: Tables, tmp_path: Path) -> None:
    scores = world.described["tasks"]["click"]
    assert scores["best"]["ne"] < scores["recent_only_best"]["ne"] <= scores["history_blind_best"]["ne"] <= 1
    assert scores["best"]["auc"] > scores["recent_only_best"]["auc"] > scores["history_blind_best"]["auc"] >= 0.5
    name = world.described["name"]
    whole = small(name, settings={"recent_events": 300})
    scores = write_world(name, tmp_path / "whole", whole)["tasks"]["click"]
    assert scores["recent_only_best"]["ne"] == pytest.approx(scores["best"]["ne"], abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_short_memory_sees_ignores_older_events(name: str) -> None:
    """The ceiling of recent-only models rests on statistics of the last events alone."""
    world = make_world(name, small(name))
    part = draw_user(world, 0)
    for row, known in enumerate(part.requests.num_known):
        one = Requests(part.requests.num_known[row : row + 1], part.requests.item[row : row + 1])
        seen = world.statistics(part.log, one, last_events=50)
        item = part.log.item.copy()
        item[: max(known - 50, 0)] = (item[: max(known - 50, 0)] + 1) % world.items
        action = part.log.action.copy()
        action[: max(known - 50, 0)] = (action[: max(known - 50, 0)] + 1) % len(ACTIONS)
        for fact, values in world.statistics(Log(item, world.category_of(item), action), one, last_events=50).items():
            assert np.array_equal(values, seen[fact]), fact


@pytest.mark.parametrize("name", ["needle", "repetition", "lifelong"])
def test_age_is_that_of_the_like(name: str, tmp_path: Path) -> None:
    write_world(name, tmp_path / name, small(name))
    tables = Tables.read(tmp_path / name)
    category = dict(tables.items.iter_rows())
    histories = {user: tables.history(user) for user in range(6)}
    num_old = 0
    for row in tables.details.iter_rows(named=True):
        before = [event for event in histories[row["user_id"]] if event[0] < row["timestamp"]]
        likes = [n for n, (_, _, c, a) in enumerate(before) if a == "like" and c == category[row["item_id"]]]
        assert row["age_events"] == (len(before) - likes[-1] if likes else -1)
        num_old += row["age_events"] > 100
    assert num_old > 10


def test_ages_of_needles_are_those_asked_for(tmp_path: Path) -> None:
    options = WorldOptions(users=30, events=3000, requests=24, settings={"ages": "10,100,1000", "likes": 6})
    write_world("needle", tmp_path / "w", options)
    ages = pl.read_parquet(tmp_path / "w" / "details.parquet")["age_events"].value_counts()
    counts = dict(ages.iter_rows())
    assert set(counts) == {-1, 10, 100, 1000}
    assert min(counts[age] for age in (10, 100, 1000)) > 50


def test_ages_of_needles_reach_from_the_least_to_the_whole_history(tmp_path: Path) -> None:
    write_world("needle", tmp_path / "w", WorldOptions(users=40, events=20_000))
    ages = pl.read_parquet(tmp_path / "w" / "details.parquet")["age_events"].to_numpy()
    per_decade = np.histogram(ages[ages > 0], [100, 500, 2_500, 12_500, 20_000])[0]
    assert ages[ages > 0].min() >= 100
    assert per_decade[:3].min() > 300
    assert per_decade[3] > 20


@pytest.mark.parametrize("same_item", [False, True])
def test_a_hit_shows_the_liked_item_only_where_asked(same_item: bool) -> None:
    world = make_world("needle", small("needle", settings={"same_item": same_item}))
    is_same = []
    for user in range(6):
        part = draw_user(world, user)
        liked = {world.category_of(item): item for item in part.log.item[part.log.is_like]}
        is_hit = world.details(part.log, part.requests)["age_events"] > 0
        is_same += [liked[world.category_of(item)] == item for item in part.requests.item[is_hit]]
    assert len(is_same) > 50
    assert set(is_same) == {same_item}


def test_repetition_has_one_item_beside_the_likes() -> None:
    world = make_world("repetition", small("repetition"))
    part = draw_user(world, 1)
    assert len(set(part.log.item[~part.log.is_like])) == 1
    assert 1 <= part.log.is_like.sum() <= 4


def test_membership_touches_so_many_items_and_says_which_are_rare(tmp_path: Path) -> None:
    write_world("membership", tmp_path / "w", WorldOptions(users=5, events=3000, items=200, settings={"touched": 20}))
    tables = Tables.read(tmp_path / "w")
    for user in range(5):
        assert len({item for _, item, _, _ in tables.history(user)}) == 20
        details = tables.details.filter(pl.col("user_id") == user).sort("timestamp")
        last = details.filter(pl.col("timestamp") == details["timestamp"].max())
        before = [event for event in tables.history(user) if event[0] < last["timestamp"][0]]
        counts = {item: sum(i == item for _, i, _, _ in before) for item in {i for _, i, _, _ in before}}
        middle = sorted(counts.values())[(len(counts) - 1) // 2]
        for row in last.iter_rows(named=True):
            touches = counts.get(row["item_id"], 0)
            assert row["touches"] == touches
            assert row["is_rare"] == (0 < touches <= middle)
    rare = tables.details.filter(pl.col("touches") > 0)["is_rare"].mean()
    assert 0.4 < rare < 0.6


def test_copies_of_one_thing_lie_between_what_is_asked_and_the_requests() -> None:
    world = Membership(events=300, requests=20, copies=200, touched=10, items=64)
    log, requests = world.draw(np.random.default_rng(3))
    run = log.item[50:250]
    assert len(log.item) == 300
    assert (run == run[0]).all()
    assert (log.item[:50] != run[0]).any()
    assert requests.num_known.min() >= 250
    with pytest.raises(ConfigError, match="copies 261 must lie between 0 and"):
        Membership(events=300, requests=20, copies=261)


def test_counting_asks_about_small_and_large_counts(tmp_path: Path) -> None:
    write_world("counting", tmp_path / "w", WorldOptions(users=20))
    tables = Tables.read(tmp_path / "w")
    per_octave = np.histogram(tables.details["touches"].to_numpy(), [1, 2, 4, 8, 16, 32])[0]
    assert per_octave.min() > 0.1 * len(tables.details)
    is_untouched = tables.details["touches"] == 0
    assert is_untouched.mean() == pytest.approx(0.1, abs=0.03)
    assert ((tables.details["age_events"] == -1) == is_untouched).all()


def test_a_memory_that_only_recognises_falls_short_of_one_that_counts(tmp_path: Path) -> None:
    described = write_world("counting", tmp_path / "w", WorldOptions(users=20))
    tables = Tables.read(tmp_path / "w")
    truth, touches = tables.impressions["best_score"].to_numpy(), tables.details["touches"].to_numpy()
    assert expected(truth, cell_means(truth, touches > 0))["ne"] > described["tasks"]["click"]["best"]["ne"] + 0.3


def test_periodic_things_return_after_their_period_until_they_stop() -> None:
    settings = {"returning": 10, "min_period": 50, "max_period": 100, "jitter": 0.1, "stop_share": 0.5}
    world = make_world("periodic", WorldOptions(events=2_000, items=10_000, settings=settings))
    num_stopped = num_returning = 0
    for user in range(5):
        item = draw_user(world, user).log.item
        for thing in np.unique(item):
            places = np.flatnonzero(item == thing)
            if len(places) < 8:  # of those that happen to come at all, and those that stop at once
                continue
            gaps = np.diff(places)
            assert gaps.max() / gaps.min() < 1.1 / 0.9 * 1.1  # its own jitter, and that of its place in between
            num_returning += 1
            num_stopped += 2_000 - places[-1] > 200
    assert 25 < num_returning < 50
    assert 5 < num_stopped < num_returning - 20


def test_periodic_details_are_the_last_two_distances(tmp_path: Path) -> None:
    write_world("periodic", tmp_path / "w", small("periodic"))
    tables = Tables.read(tmp_path / "w")
    outcomes = set()
    for user in range(6):
        history = tables.history(user)
        for row in tables.details.filter(pl.col("user_id") == user).iter_rows(named=True):
            items = [item for time, item, _, _ in history if time < row["timestamp"]]
            places = [n for n, item in enumerate(items) if item == row["item_id"]]
            assert row["age_events"] == (len(items) - places[-1] if places else -1)
            assert row["gap_events"] == (places[-1] - places[-2] if places[1:] else -1)
            late = row["age_events"] / row["gap_events"]
            outcomes.add("none" if not places[1:] else "early" if late < 0.8 else "overdue" if late > 1.2 else "due")
    assert outcomes == {"none", "early", "due", "overdue"}


def test_dislikes_take_back_likes_and_likes_dislikes(tmp_path: Path) -> None:
    write_world("dislike", tmp_path / "w", WorldOptions(users=40))
    tables = Tables.read(tmp_path / "w")
    assert set(tables.events["action"]) == {"view", "like", "dislike"}
    both = tables.details.with_columns(tables.impressions["best_score"])
    ever_liked, ever_disliked = pl.col("likes") > 0, pl.col("dislikes") > 0
    assert both.filter(~ever_liked)["best_score"].unique().to_list() == [0.1]
    assert both.filter(ever_liked & ~ever_disliked)["best_score"].unique().to_list() == [0.9]
    mixed = both.filter(ever_liked & ever_disliked)
    assert 0.2 < (mixed["best_score"] == 0.1).mean() < 0.8
    assert len(mixed) > 0.4 * len(both)
    assert (mixed["age_events"] > 500).sum() > 100
    assert ((both["age_events"] == -1) == (both["likes"] + both["dislikes"] == 0)).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_opinions_flip_as_often_as_asked(flip: float) -> None:
    world = make_world("dislike", WorldOptions(settings={"flip": flip}))
    log = draw_user(world, 0).log
    num_pairs = 0
    for category in range(26, 50):
        opinions = log.action[(log.category == category) & (log.action > 0)]
        assert ((np.diff(opinions) != 0) == bool(flip)).all()
        num_pairs += max(len(opinions) - 1, 0)
    assert num_pairs > 20


def test_a_million_events_of_one_user() -> None:
    world = make_world("needle", WorldOptions(users=1, events=1_000_000, requests=32))
    part = draw_user(world, 0)
    assert (np.diff(part.event_s) > 0).all()
    assert world.details(part.log, part.requests)["age_events"].max() > 10_000


# --- the pieces


def test_counter_counts() -> None:
    counter = Counter.of(np.array([2, 0, 2, 1, 2]))
    assert [int(counter.before(np.array(2), np.array(n))) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert int(counter.within(np.array(2), np.array(1), np.array(4))) == 1
    assert counter.age(np.array([0, 1, 2, 3]), np.array(4)).tolist() == [3, 1, 2, -1]
    assert counter.age(np.array([0, 1]), np.array([1, 3])).tolist() == [-1, -1]
    assert Counter.of(np.array([2, 2]), np.array([False, False])).age(np.array([2]), np.array(2)).tolist() == [-1]


def test_draw_distinct_draws_different_columns_by_weight() -> None:
    weight = np.tile([0.0, 1.0, 1.0, 8.0], (4000, 1))
    drawn = draw_distinct(np.random.default_rng(0), weight, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert 0 not in drawn
    first = np.bincount(drawn.ravel(), minlength=4) / 4000
    assert first[3] == pytest.approx(0.8 + 2 * 0.1 * 8 / 9, abs=0.02)


def test_expected_scores_by_hand() -> None:
    scores = expected(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    assert scores == {"ne": pytest.approx(1.0), "auc": 0.5, "log_loss": pytest.approx(math.log(2))}
    certain = expected(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert certain == {"ne": 0.0, "auc": 1.0, "log_loss": 0.0}
    assert expected(np.array([1.0, 1.0]), np.array([0.5, 0.5])) == {"ne": None, "auc": None, "log_loss": None}
    assert expected(np.array([0.9, 0.1]), np.array([0.9, 0.1]))["auc"] == pytest.approx((0.81 + 0.09) / 1.0)


def test_cells_agree_in_every_fact() -> None:
    probability = np.array([0.1, 0.3, 0.5, 0.9])
    means = cell_means(probability, np.array([0, 0, 1, 1]), np.array([2, 2, 2, 3]))
    assert means.tolist() == pytest.approx([0.2, 0.2, 0.5, 0.9])


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lifelon", WorldOptions(), "did you mean 'lifelong'"),
        ("needle", WorldOptions(settings={"lieks": 3}), "did you mean 'likes'"),
        ("drift", WorldOptions(settings={"likes": 3}), "no setting 'likes'"),
        ("needle", WorldOptions(settings={"p_hit": "high"}), "p_hit = 'high' is no float"),
        ("needle", WorldOptions(settings={"p_hit": 1.5}), "p_hit 1.5 is no probability"),
        ("needle", WorldOptions(events=1000, settings={"ages": "100,5000"}), "ages .*5000.* must lie between 1 and"),
        ("needle", WorldOptions(users=0), "users 0 must be at least 1"),
        ("needle", WorldOptions(requests=3000), "requests 3000 must be less than events"),
        ("needle", WorldOptions(events=100_000_000), "span_days 730 is too short"),
        ("lifelong", WorldOptions(categories=10), "rare_categories 16 must lie between 1 and"),
        ("membership", WorldOptions(items=20), "touched 48 must lie between 1 and"),
        ("drift", WorldOptions(settings={"focus": 2}), "focus 2.0 is no share"),
        ("counting", WorldOptions(settings={"by_category": True}), "touched 128 must lie between 1 and categories"),
        ("counting", WorldOptions(settings={"most_often": 0.5}), "most_often 0.5 must be at least 1"),
        ("counting", WorldOptions(settings={"untouched_share": 1}), "untouched_share 1.0 must lie between 0 and 1"),
        ("periodic", WorldOptions(settings={"min_period": 16}), "min_period 16 is too short for returning .24. things"),
        ("periodic", WorldOptions(settings={"min_period": 600}), "min_period 600 must lie between 1 and max_period"),
        ("periodic", WorldOptions(settings={"tolerance": 1}), "tolerance 1.0 must be at least 0 and below 1"),
        ("periodic", WorldOptions(settings={"stop_share": 2}), "stop_share 2.0 is no share"),
        ("dislike", WorldOptions(settings={"opinions": 3000}), "opinions 3000 must lie between 1 and events"),
        ("dislike", WorldOptions(settings={"flip": -1}), "flip -1.0 is no probability"),
        ("dislike", WorldOptions(candidates=30), "candidates 30 must be at most rare_categories"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(name: str, options: WorldOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write_world(name, tmp_path / "w", options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine.txt").write_text("keep")
    with pytest.raises(StaleOutput, match="is there already"):
        write_world("needle", tmp_path / "w", small("needle"))
    assert [path.name for path in tmp_path.rglob("*")] == ["w", "mine.txt"]

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vista.data.worlds.write._describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_world("needle", tmp_path / "other", small("needle"))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_command_writes_the_same_as_the_call(tmp_path: Path) -> None:
    words = ["synth", "needle", "--out", str(tmp_path / "a"), "--users", "3", "--events", "300", "--requests", "16",
             "--likes", "4", "--ages", "5,50", "--same-item", "--set", "p_hit=0.8", "--seed", "7"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    settings = {"likes": 4, "ages": (5, 50), "same_item": True, "p_hit": 0.8}
    described = write_world("needle", tmp_path / "b", replace(small("needle", users=3, seed=7), settings=settings))
    assert (tmp_path / "a" / "events.parquet").read_bytes() == (tmp_path / "b" / "events.parquet").read_bytes()
    assert f"best: NE {described['tasks']['click']['best']['ne']:.4f}" in result.output
    assert described["parameters"]["ages"] == (5, 50)
    result = CliRunner().invoke(app, [*words[:2], "--out", str(tmp_path / "c"), *words[4:], "--json"])
    assert json.loads(result.stdout[result.stdout.index("{") :])["num_events"] == 900
