"""An event log as item sequences, for protocols that go by order alone (leave-one-out), held in memory.

Events are ordered by a column that says so, a time or a place. Rare users and items are left out by the k-core filter:
again and again, until every user and every item that is left has ``min_events`` events.

Shape letters: B users, N events, V items.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from vista.data.events import TimeRules, open_clock
from vista.data.tables import Table, find_files, id_kind, read_table
from vista.errors import ConfigError, DataError

LEAST_EVENTS = 3  # of a user: one to test with, one to validate with, one to read


@dataclass(frozen=True)
class SequenceColumns:
    """Names of the columns. order: by which a user's events are sorted; timestamp: None where times are not known."""

    user: str = "user_id"
    item: str = "item_id"
    order: str = "timestamp"
    timestamp: str | None = None


@dataclass(frozen=True)
class Sequences:
    """Every user's items in order, user after user.

    user_ids (B,), item_ids (V,): what the outside calls them; item (N,) int64, 1 .. V: the place in item_ids, from 1;
    timestamp_us (N,) int64, never falling within a user, all 0 where times are not known; offsets (B + 1,) int64.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    item: np.ndarray
    timestamp_us: np.ndarray
    offsets: np.ndarray

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def fingerprint(self) -> str:
        """Of all that numbers can depend on, 16 hexadecimal characters."""
        digest = hashlib.sha256()
        for values in (self.item, self.timestamp_us, self.offsets):
            digest.update(np.ascontiguousarray(values, np.int64).tobytes())
        return digest.hexdigest()[:16]


def read_sequences(source: Path | str, columns: SequenceColumns, min_events: int = 5) -> Sequences:
    """Read a log (Parquet or CSV; file, folder or glob), sort and filter it.

    Raises DataError for what cannot be used, MissingColumn, and ConfigError for min_events below 3.
    """
    if min_events < LEAST_EVENTS:
        raise ConfigError(f"--min-events {min_events}: leave-one-out takes {LEAST_EVENTS} events of each user, or more")
    tables = [Table.open(file) for file in find_files(source, "events")]
    _check(tables, columns)
    _, frame = read_table(source, "events", (columns.user, columns.item))
    timestamp = pl.lit(0, pl.Int64) if columns.timestamp is None else _times_us(tables, frame, columns.timestamp)
    is_number = frame.schema[columns.order].is_numeric()  # a place or a time; text would be sorted by its letters
    order = pl.col(columns.order) if is_number else _times_us(tables, frame, columns.order)
    frame = frame.select(
        pl.col(columns.user).alias("user"),
        pl.col(columns.item).alias("item"),
        order.alias("order"),
        timestamp.alias("timestamp_us"),
    )
    frame = core(frame, min_events)
    if not len(frame):
        raise DataError(
            f"{source}: no user and no item is left that has {min_events} events with the others; lower --min-events"
        )
    return _arrays(frame.sort("user", "order", maintain_order=True))


def _times_us(tables: list[Table], frame: pl.DataFrame, column: str) -> pl.Expr:
    """A column's times in microseconds. Raises DataError naming the row of what is none."""
    clock = open_clock(tables, column, TimeRules())
    return clock.ticks(column, frame.schema[column]).cast(pl.Int64) * clock.tick_us


def core(frame: pl.DataFrame, min_events: int) -> pl.DataFrame:
    """The rows of the largest set in which each value of ``user`` and of ``item`` has min_events rows or more."""
    size = -1
    while size != len(frame):
        size = len(frame)
        frame = frame.filter((pl.len().over("item") >= min_events) & (pl.len().over("user") >= min_events))
    return frame


def _check(tables: list[Table], columns: SequenceColumns) -> None:
    named = {columns.user: "--user-column", columns.item: "--item-column", columns.order: "--order-column"}
    if columns.timestamp is not None:
        named |= {columns.timestamp: "--timestamp-column"}
    for table in tables:
        table.require(named)
        for column in named:
            table.refuse_where(pl.col(column).is_null(), column, "is not a value; fill it in or remove the row")
    for column in (columns.user, columns.item):
        id_kind(tables, column)


def _arrays(frame: pl.DataFrame) -> Sequences:
    item_ids = frame["item"].unique().sort()
    codes = item_ids.search_sorted(frame["item"])
    counts = frame.group_by("user", maintain_order=True).len()
    offsets = np.concatenate([[0], counts["len"].to_numpy().astype(np.int64).cumsum()])
    timestamp_us = frame["timestamp_us"].to_numpy().copy()
    for start, end in pairwise(offsets.tolist()):  # the order is given; a time that falls is not exact
        np.maximum.accumulate(timestamp_us[start:end], out=timestamp_us[start:end])
    item = np.asarray(codes).astype(np.int64) + 1
    return Sequences(counts["user"].to_numpy(), item_ids.to_numpy(), item, timestamp_us, offsets)
