"""Joined summaries: the newest known at each time, never one of the future; against the definition, row by row."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.data import SummaryFeatures
from vista.data.requests import MomentColumns, places_of
from vista.data.summaries import ExportFacts, Summaries, begin_export, end_export, part_path, write_part
from vista.errors import ConfigError, DataError, MissingColumn, StaleOutput

K, D = 2, 3


def write_export(folder, parts, codec="float32", complete=True, integer=True):
    """parts: lists of (user, newest_us, num_events); the tokens are the number of the row."""
    facts = ExportFacts("v" * 16, "borders", codec, K, D, len(parts), 100, integer, "data")
    begin_export(folder, facts, np.full((K, D), -1.0))
    number = 0
    for part, rows in enumerate(parts):
        user, newest, count = (np.array([row[i] for row in rows]) for i in range(3))
        tokens = np.arange(number, number + len(rows), dtype=np.float32)[:, None, None] * np.ones((1, K, D), np.float32)
        number += len(rows)
        user = user.astype(np.int64 if integer else object)
        columns = (a.astype(np.int64) for a in (newest + 1, newest, count, newest))
        write_part(folder, part, facts, [Summaries(user, *columns, tokens)])
    if complete:
        end_export(folder, facts)
    return folder


rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 5)), max_size=12)
asked = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 35)), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(rows, min_size=1, max_size=3), asked=asked)
def test_the_join_is_the_definition(tmp_path_factory, parts, asked):
    folder = write_export(tmp_path_factory.mktemp("export") / "out", parts)
    every = [row for part in parts for row in part]
    joined = SummaryFeatures.open(folder).join([user for user, _ in asked], np.array([t for _, t in asked]))
    found = joined[:]
    for place, (user, time) in enumerate(asked):
        known = [(newest, count) for owner, newest, count in every if owner == user and newest < time]
        assert found["is_known"][place] == bool(known)
        if not known:
            assert (found["tokens"][place] == -1).all()
            assert (found["num_events"][place], found["age_us"][place]) == (0, -1)
            continue
        number = int(found["tokens"][place, 0, 0])
        assert every[number] == (user, *max(known)), "not the newest that was known"
        assert found["age_us"][place] == time - max(known)[0] > 0


@settings(max_examples=15, deadline=None)
@given(rows=rows, asked=asked, moment=st.integers(0, 35))
def test_the_future_changes_nothing(tmp_path_factory, rows, asked, moment):
    """Whatever happens from an impression on, and however it is exported: its features stay."""
    past = [row for row in rows if row[1] < moment]
    asked = [(user, min(time, moment)) for user, time in asked]
    folder = tmp_path_factory.mktemp("export")
    users, times = [user for user, _ in asked], np.array([time for _, time in asked])
    # rows keep their number, and so their tokens: the past first
    whole = past + [row for row in rows if row[1] >= moment]
    with_future = SummaryFeatures.open(write_export(folder / "a", [whole])).join(users, times)[:]
    without = SummaryFeatures.open(write_export(folder / "b", [past])).join(users, times)[:]
    for name in with_future:
        np.testing.assert_array_equal(with_future[name], without[name])


@pytest.fixture
def features(tmp_path):
    return SummaryFeatures.open(write_export(tmp_path / "out", [[(7, 10, 4), (7, 20, 8)], [(9, 5, 4)]]))


def test_batches_cover_all_rows_in_the_order_asked_for(features):
    joined = features.join([7, 9, 7, 8, 7], np.array([11, 6, 21, 50, 10]), np.array([5, 4, 11, 0, 4]))
    seen = []
    for chosen, batch in joined.batches(2, seed=0):
        np.testing.assert_array_equal(batch["tokens"], joined[chosen]["tokens"])
        assert batch["tokens"].dtype == np.float32
        seen += chosen.tolist()
    assert sorted(seen) == list(range(5))
    assert seen != list(range(5))
    everything = joined[:]
    assert everything["tokens"][:, 0, 0].tolist() == [0, 2, 1, -1, -1]
    assert everything["age_events"].tolist() == [1, 0, 3, 0, 4]
    assert joined[2]["tokens"].shape == (K, D)
    assert int(joined[2]["num_events"]) == 8
    assert (joined[3]["tokens"] == -1).all()


def test_staleness_tells_both_ages(features):
    found = features.join([7, 9, 8], np.array([1_000_010, 6, 6]), np.array([11, 5, 0])).staleness()
    assert found["share_cold"] == pytest.approx(1 / 3)
    assert found["age_events_p50"] == 2  # 3 behind, 1 behind
    assert found["age_s_p95"] == pytest.approx(np.percentile([0.99999, 1e-6], 95))
    assert "age_events_p50" not in features.join([7], np.array([11])).staleness()


def test_users_are_the_same_as_numbers_and_as_text(tmp_path):
    assert places_of(pl.Series(["7", "007", "x", "9"]), pl.Series([9, 7])).tolist() == [1, -1, -1, 0]
    folder = write_export(tmp_path / "text", [[("7", 10, 4), ("anna", 20, 8)]], integer=False)
    found = SummaryFeatures.open(folder).join([7, 8], np.array([11, 11]))
    assert found[:]["is_known"].tolist() == [True, False]


def test_a_table_is_joined_row_by_row(tmp_path):
    start = 10**15
    rows = [(7, start + 10, 4), (7, start + 20, 8), (9, start + 5, 4)]
    features = SummaryFeatures.open(write_export(tmp_path / "out", [rows]))
    (tmp_path / "shown.csv").write_text(f"who,at,click\n9,{start + 6},1\n7,{start + 21},0\n")
    frame, joined = features.join_table(tmp_path / "shown.csv", MomentColumns("who", "at", "us"))
    assert frame["click"].to_list() == [1, 0]
    assert joined[:]["tokens"][:, 0, 0].tolist() == [2, 1]
    with pytest.raises(MissingColumn, match="--user-column"):
        features.join_table(tmp_path / "shown.csv")
    (tmp_path / "bad.csv").write_text(f"who,at\n9,{start}\n,{start}\n")
    with pytest.raises(DataError, match=r"bad.csv, row 2, column 'who'"):
        features.join_table(tmp_path / "bad.csv", MomentColumns("who", "at", "us"))


def test_float16_is_read_as_float32(tmp_path):
    features = SummaryFeatures.open(write_export(tmp_path / "half", [[(7, 10, 4)]], codec="float16"))
    assert features.tokens.dtype == np.float16
    assert features.join([7], np.array([11]))[:]["tokens"].dtype == np.float32


def test_a_million_rows_take_no_loop(features):
    """Far below what a Python loop over rows would take, even on a busy machine."""
    import time

    users, times = np.random.default_rng(0).integers(0, 10, 1_000_000), np.full(1_000_000, 15)
    started = time.process_time()
    joined = features.join(users, times)
    assert time.process_time() - started < 5
    assert (joined.row >= 0).mean() == pytest.approx(np.isin(users, [7, 9]).mean())


def test_an_export_that_is_not_whole_is_refused(tmp_path, features):
    with pytest.raises(StaleOutput, match="no exported summaries"):
        SummaryFeatures.open(tmp_path)
    folder = write_export(tmp_path / "cut", [[(7, 10, 4)], [(8, 10, 4)]], complete=False)
    with pytest.raises(StaleOutput, match="not complete"):
        SummaryFeatures.open(folder)
    part_path(features.folder, 1).unlink()
    with pytest.raises(StaleOutput, match="1 of 2 parts"):
        SummaryFeatures.open(features.folder)
    with pytest.raises(ConfigError, match="2 users, 1 times"):
        features.join([7, 9], np.array([1]))


def test_what_a_codec_cannot_hold_is_refused_and_leaves_no_file(tmp_path):
    facts = ExportFacts("v" * 16, "borders", "float16", 1, 1, 1, 100, True, "data")
    begin_export(tmp_path / "out", facts, np.zeros((1, 1)))
    one = np.ones(1, np.int64)
    for value in (1e6, np.nan):
        block = Summaries(one, one, one, one, one, np.full((1, 1, 1), value, np.float32))
        with pytest.raises(DataError, match=r"float32|not finite"):
            write_part(tmp_path / "out", 0, facts, [block])
    assert not list((tmp_path / "out").glob("*part-*"))
