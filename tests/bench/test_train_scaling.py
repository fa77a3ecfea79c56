"""The measurement of training: both ways train on what they say they do, and a long window fits into memory."""

from __future__ import annotations

import numpy as np
import pytest
from bench import train_scaling

from vista.config import resolve


def test_every_way_makes_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(train_scaling, "TIMELINE_EVENTS", 1_000)
    monkeypatch.setattr(train_scaling, "ROWS_AT_ONCE", 256)
    monkeypatch.setattr(train_scaling, "STEPS_TIMED", 1)
    short, long = train_scaling.throughput([64, 128], 1, tmp_path)
    assert (short["events"], short["to_shortest"], long["events"]) == (64, 1.0, 128)
    assert all(np.isfinite(value) for row in (short, long) for value in row.values())
    assert 0 < short["build"] < 1


def test_an_impression_has_a_window_of_its_own():
    feed = train_scaling.make_feed(128, resolve("tiny"), num_users=4)
    step = next(train_scaling.by_impression(feed, 0)).portions[0].step
    assert step.batch.impression.shape[1] == 1
    assert len(step.batch.requests.num_known) == len(step.users) == train_scaling.ROWS_AT_ONCE // 128
    assert len(step.batch.events.item) >= int(step.batch.requests.num_known.sum())


@pytest.mark.slow
def test_a_window_of_100_000_events_trains_in_4_gb():
    (row,) = train_scaling.memory(["base"], 100_000)
    assert row["events"] >= 99_000
    assert row["most_gb"] < 4
