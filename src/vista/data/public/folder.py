"""What the converters share: reading a table with the columns it must have, and writing the converted folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.output import new_folder
from vista.data.tables import Table
from vista.errors import DataError, MissingColumn, nearest


def read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """A Parquet or CSV table that must have these columns. Raises MissingColumn or DataError."""
    if not path.is_file():
        raise DataError(f"{path} is not there; it belongs to this data set: check --from")
    table = Table.open(path)
    for name in columns:
        if name not in table.schema:
            raise MissingColumn(f"{path}: no column {name!r}{nearest(name, table.schema)}. Is it the right file?")
    return table.read()


def write_dataset(
    out: Path, name: str, events: pl.DataFrame, items: pl.DataFrame, described: dict[str, Any]
) -> dict[str, Any]:
    """Write the folder in one atomic step; the content of its dataset.json.

    Raises DataError when there are no events, and StaleOutput when ``out`` is not an empty or new folder.
    """
    if not len(events):
        raise DataError(f"{name}: no events are left ({described}); relax the filters or check the source")
    summary = {
        "name": name,
        **described,
        "num_users": events["user_id"].n_unique(),
        "num_items": events["item_id"].n_unique(),
        "num_events": len(events),
        "first_timestamp": events["timestamp"].min(),
        "last_timestamp": events["timestamp"].max(),
    }
    with new_folder(out) as folder:
        events.write_parquet(folder / "events.parquet")
        items.write_parquet(folder / "items.parquet")
        (folder / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
