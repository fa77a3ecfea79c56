"""Event logs as item sequences: order, k-core, times, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import shared_data
from vista.data.sequences import SequenceColumns, core, read_sequences
from vista.errors import ConfigError, DataError, MissingColumn


def log(tmp_path: Path, **columns: list[Any]) -> Path:
    pl.DataFrame(columns).write_parquet(tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def shuffled(tmp_path: Path) -> Path:
    """Three users with four items each, rows in no order; the time of user b's third event is too early."""
    rows = [(u, f"i{(k + n) % 4}", n, 100 + n) for k, u in enumerate("abc") for n in range(4)]
    rows[6] = ("b", "i3", 2, 50)
    order = np.random.default_rng(0).permutation(len(rows))
    user, item, place, time = (list(column) for column in zip(*(rows[i] for i in order), strict=True))
    return log(tmp_path, user_id=user, item_id=item, place=place, time=[1_600_000_000 + t for t in time])


def test_events_are_ordered_by_the_column_that_says_so(tmp_path):
    read = read_sequences(shuffled(tmp_path), SequenceColumns(order="place", timestamp="time"), 3)
    assert read.user_ids.tolist() == ["a", "b", "c"]
    assert read.offsets.tolist() == [0, 4, 8, 12]
    names = ["", *read.item_ids.tolist()]
    assert [names[i] for i in read.item[4:8]] == ["i1", "i2", "i3", "i0"]
    seconds = read.timestamp_us[4:8] / 1e6 - 1_600_000_000
    assert seconds.tolist() == [100, 101, 101, 103]  # a time that falls is held


def test_text_is_put_in_order_by_the_time_it_says(tmp_path):
    """And what says none is refused: by its letters 12/31/2023 would come after 01/05/2024."""
    days = ["2023-12-30T10:00:00+02:00", "2023-12-30T09:00:00Z", "2023-12-31T01:00:00+09:00"]  # 8, 9 and 16 o'clock
    rows = [(u, f"i{k}", days[k]) for u in "abc" for k in (2, 0, 1)]
    user, item, day = (list(column) for column in zip(*rows, strict=True))
    read = read_sequences(log(tmp_path, user_id=user, item_id=item, day=day), SequenceColumns(order="day"), 3)
    assert read.item_ids[read.item - 1].tolist() == ["i0", "i1", "i2"] * 3
    american = log(tmp_path, user_id=user, item_id=item, day=["12/31/2023 10:00"] * 9)
    with pytest.raises(DataError, match=r"row 1, column 'day': '12/31/2023 10:00' is not a time"):
        read_sequences(american, SequenceColumns(order="day"), 3)


def test_without_a_time_column_no_time_is_read(tmp_path):
    read = read_sequences(shuffled(tmp_path), SequenceColumns(order="place"), 3)
    assert not read.timestamp_us.any()
    assert read.fingerprint != read_sequences(
        shuffled(tmp_path), SequenceColumns(order="place", timestamp="time"), 3
    ).fingerprint  # fmt: skip


def test_the_core_is_the_largest_set_that_meets_the_rule():
    random = np.random.default_rng(1)
    frame = pl.DataFrame({"user": random.integers(0, 40, 300), "item": random.integers(0, 45, 300)})
    rows = list(zip(frame["user"].to_list(), frame["item"].to_list(), strict=True))
    while True:
        kept = [r for r in rows if sum(r[0] == s[0] for s in rows) >= 5 and sum(r[1] == s[1] for s in rows) >= 5]
        if len(kept) == len(rows):
            break
        rows = kept
    assert 0 < len(rows) < 300
    assert core(frame, 5).rows() == rows


@pytest.mark.parametrize(
    ("columns", "min_events", "error", "message"),
    [
        (SequenceColumns(order="plase"), 3, MissingColumn, "did you mean 'place'"),
        (SequenceColumns(order="place", item="x"), 3, MissingColumn, "--item-column"),
        (SequenceColumns(order="place"), 2, ConfigError, "--min-events 2"),
        (SequenceColumns(order="place"), 5, DataError, "lower --min-events"),
    ],
)
def test_what_cannot_be_used_is_refused(columns, min_events, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_sequences(shuffled(tmp_path), columns, min_events)


def test_a_missing_item_is_named_by_its_row(tmp_path):
    path = log(tmp_path, user_id=[1, 1, 1], item_id=[1, None, 3], timestamp=[1, 2, 3])
    with pytest.raises(DataError, match="row 2, column 'item_id'"):
        read_sequences(path, SequenceColumns(), 3)


def test_movielens_has_the_published_size():
    read = read_sequences(shared_data("ml-1m") / "events.parquet", SequenceColumns(order="pos"))
    assert (read.num_users, read.num_items, len(read.item)) == (6040, 3416, 999_611)
