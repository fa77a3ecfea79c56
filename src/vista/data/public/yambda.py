"""Yambda: what a million people listened to, liked and disliked on Yandex Music; up to five billion events.

Read from the Parquet files as published, in either layout: *flat* (one row per event) or *sequential* (one row per
user, with lists). Times count seconds from an unknown day, in steps of five; here they count from 2020-01-01, so
that distances are right and dates mean nothing. An event's action is what was done; a listen that was broken off
before half of the track is a ``skip``. A track's category is its artist (the first of several).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import open_table, survey, write_dataset
from vista.data.tables import Table
from vista.errors import ConfigError, DataError, nearest

SIZES = ("50m", "500m", "5b")
LAYOUTS = ("flat", "sequential")
ACTIONS = {"listens": "listen", "likes": "like", "dislikes": "dislike", "unlikes": "unlike", "undislikes": "undislike"}
ARTISTS = "artist_item_mapping.parquet"
KEYS = ("uid", "item_id", "timestamp")
PLAYED = "played_ratio_pct"
LEAST_PLAYED_PCT = 50  # of a listen that is no skip
START_S = 1_577_836_800  # 2020-01-01 UTC, in place of the unknown first day
STEP_S = 5  # the published times are rounded to it
LONGEST_S = 5 * 365 * 86_400  # the log spans less than a year; beyond this a time is no distance in seconds


@dataclass(frozen=True)
class YambdaOptions:
    """size, layout: which of the published folders ``LAYOUT/SIZE`` is read, where --from is not that folder itself.

    actions: the files that are read, separated by commas. with_skips: keep listens that were broken off.
    """

    size: str = "50m"
    layout: str = "flat"
    actions: str = "listens,likes,dislikes"
    with_skips: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("size", self.size, SIZES), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise ConfigError(f"--{name} {value!r}: unknown{nearest(value, known)}")
        for name in self.kept or [""]:
            if name not in ACTIONS:
                raise ConfigError(f"--actions {self.actions!r}: unknown file {name!r}{nearest(name, ACTIONS)}")

    @property
    def kept(self) -> list[str]:
        return [name.strip() for name in self.actions.split(",") if name.strip()]


def convert_yambda(out: Path, source: Path, options: YambdaOptions | None = None) -> dict[str, Any]:
    """Convert a copy into a new folder; what is in its dataset.json. Nothing of the log is held in memory.

    source: the folder of the data set, with ``flat`` or ``sequential`` in it, or one that holds ``listens.parquet``.
    Raises DataError for a file that is missing, truncated or holds something else, and MissingColumn.
    """
    options = options or YambdaOptions()
    folder = source / options.layout / options.size
    if not folder.is_dir():
        folder = source
    tables = {name: _open(folder / f"{name}.parquet", name) for name in options.kept}
    for table in tables.values():
        _check(table)
    events = pl.concat([_events(table, name, options) for name, table in tables.items()])
    items = events.select("item_id").unique()
    artists = _artists(source, folder)
    if artists is not None:
        first = artists.scan().group_by("item_id").agg(pl.col("artist_id").min().alias("category"))
        items = items.join(first.cast(pl.Int64), on="item_id", how="left")
    described = {"source": source.resolve().name, "actions": options.kept, "with_skips": options.with_skips,
                 "has_artists": artists is not None}  # fmt: skip
    written: dict[str, pl.LazyFrame | pl.DataFrame] = {"events": events, "items": items.sort("item_id")}
    sources = (*tables.values(), *([artists] if artists is not None else []))
    return write_dataset(out, "yambda", written, described, sources)


def _open(path: Path, name: str) -> Table:
    return open_table(path, KEYS, (PLAYED,) if name == "listens" else ())


def _artists(source: Path, folder: Path) -> Table | None:
    """The table of artists, from the data set's folder or the one that was given; None where there is none."""
    found = [path for path in (source / ARTISTS, folder / ARTISTS, *(p / ARTISTS for p in source.resolve().parents[:2]))
             if path.is_file()]  # fmt: skip
    return open_table(found[0], ("artist_id", "item_id")) if found else None


def _is_sequential(table: Table) -> bool:
    return isinstance(table.schema["timestamp"], pl.List)


def _check(table: Table) -> None:
    """Raise DataError where times are no distances in seconds, in steps of five."""
    _, first, last = survey(table, KEYS, "timestamp")
    time = pl.col("timestamp").list.eval(pl.element() % STEP_S).list.sum() if _is_sequential(table) else None
    uneven = table.first_row((time if time is not None else pl.col("timestamp") % STEP_S) > 0)
    if uneven is not None or last > LONGEST_S or first < 0:
        where = "" if uneven is None else f", row {uneven[0]}"
        raise DataError(
            f"{table.path}{where}, column 'timestamp': from {first} to {last}, expected seconds since the first day of "
            f"the log, in steps of {STEP_S}; is it the file as published?"
        )


def _events(table: Table, name: str, options: YambdaOptions) -> pl.LazyFrame:
    """One row per event, users and times in the order of the file."""
    columns = [*KEYS, PLAYED] if name == "listens" else [*KEYS]
    rows = table.scan().select(columns)
    if _is_sequential(table):
        rows = rows.explode([column for column in columns if column != "uid"])
    action = pl.lit(ACTIONS[name])
    if name == "listens":
        is_skip = pl.col(PLAYED) < LEAST_PLAYED_PCT
        rows = rows if options.with_skips else rows.filter(~is_skip)
        action = pl.when(is_skip).then(pl.lit("skip")).otherwise(action)
    return rows.select(
        pl.col("uid").cast(pl.Int64).alias("user_id"),
        pl.col("item_id").cast(pl.Int64),
        (pl.col("timestamp").cast(pl.Int64) + START_S).alias("timestamp"),
        action.alias("action"),
    )
