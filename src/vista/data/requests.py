"""Moments to be looked up: a table of user ids and times, Parquet or CSV, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from vista.data.events import TimeRules, open_clock
from vista.data.tables import place_of, read_table
from vista.errors import DataError


@dataclass(frozen=True)
class MomentColumns:
    """Names of the columns, and the unit of times that are numbers: s, ms, us, ns or None to infer it."""

    user: str = "user_id"
    timestamp: str = "timestamp"
    time_unit: str | None = None


def read_moments(path: Path | str, columns: MomentColumns) -> tuple[pl.DataFrame, pl.Series, np.ndarray]:
    """The whole table, its user ids and its times in microseconds since 1970 UTC (n,) int64.

    Raises MissingColumn, and DataError naming file and row of an id or a time that is missing or cannot be read.
    """
    tables, frame = read_table(path, "requests", (columns.user,))
    for table in tables:
        table.require({columns.user: "--user-column", columns.timestamp: "--timestamp-column"})
    clock = open_clock(tables, columns.timestamp, TimeRules(columns.time_unit))
    ticks = frame.select(clock.ticks(columns.timestamp, frame.schema[columns.timestamp])).to_series()
    for name, values in ((columns.user, frame[columns.user]), (columns.timestamp, ticks)):
        wrong = values.is_null().arg_true()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{place_of(tables, row)}, column {name!r}: {frame[name][row]!r} cannot be used; remove it")
    return frame, frame[columns.user], ticks.to_numpy() * clock.tick_us


def places_of(ids: pl.Series, known: pl.Series | np.ndarray) -> np.ndarray:
    """The place of each id in ``known`` (distinct ids), -1 where it is not there; 7 and "7" are the same user."""
    known = pl.Series("id", known)
    if known.dtype == pl.String:
        ids = ids.cast(pl.String)
    elif not ids.dtype.is_integer():  # "007" is another user than 7, as everywhere
        text = ids.cast(pl.String)
        ids = text.to_frame("id").select(
            pl.when(pl.col("id").str.contains("^(0|-?[1-9][0-9]*)$")).then(pl.col("id").cast(pl.Int64, strict=False))
        ).to_series()  # fmt: skip
    else:
        ids = ids.cast(pl.Int64, strict=False)
    table = pl.DataFrame({"id": known}).with_row_index("place")
    wanted = ids.rename("id").to_frame()
    found = wanted.join(table, on="id", how="left", maintain_order="left")["place"]
    return found.cast(pl.Int64).fill_null(-1).to_numpy()
