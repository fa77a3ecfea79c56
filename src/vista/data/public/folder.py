"""What the converters share: opening a table with the columns it must have, and writing the converted folder.

Tables are scanned and written piece by piece, never held whole: a log may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.output import new_folder
from vista.data.tables import Table, is_full_disk, unreadable
from vista.errors import DataError, MissingColumn, nearest
from vista.progress import Progress


def open_table(path: Path, numbers: Sequence[str], others: Sequence[str] = (), header: Sequence[str] = ()) -> Table:
    """A Parquet or CSV table that must have these columns, those in ``numbers`` with nothing but whole numbers.

    header: names of the columns of a CSV file without a header. Raises DataError for a file that is not there or has a
    cell that is no whole number, naming its row, and MissingColumn.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there; it belongs to this data set: check --from")
    table = Table.open(path, header=header)
    for name in (*numbers, *others):
        if name not in table.schema:
            raise MissingColumn(f"{path}: no column {name!r}{nearest(name, table.schema)}. Is it the right file?")
    for name in numbers:
        _require_numbers(table, name)
    return table


def survey(table: Table, columns: Sequence[str], time: str) -> tuple[int, int, int]:
    """Number of rows, and the smallest and largest value of the column ``time``; a list column counts each value.

    Raises DataError naming the row of the first empty cell in ``columns``, and of a cell that cannot be read.
    """
    value = pl.col(time).explode() if isinstance(table.schema[time], pl.List) else pl.col(time)
    facts = [pl.len().alias("rows"), value.min().alias("low"), value.max().alias("high")]
    nulls = [pl.col(name).null_count().alias(f"nulls of {name}") for name in columns]
    with readable_rows([table]):
        rows, low, high, *counts = table.scan().select(*facts, *nulls).collect(engine="streaming").row(0)
    for name, count in zip(columns, counts, strict=True):
        if count:
            table.refuse_where(pl.col(name).is_null(), name, "is not there; remove the row, or fetch the file again")
    return int(rows), int(low or 0), int(high or 0)


def _require_numbers(table: Table, name: str) -> None:
    dtype = table.schema[name]
    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    if isinstance(inner, pl.DataType) and inner.is_integer():
        return
    if dtype == pl.String:
        texts = replace(table, as_text=(*table.as_text, name))
        number = pl.col(name).str.strip_chars().cast(pl.Int64, strict=False)
        texts.refuse_where(pl.col(name).is_not_null() & number.is_null(), name, "is not a whole number")
    raise DataError(f"{table.path}, column {name!r}: type {dtype}, expected whole numbers. Is it the right file?")


def read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """The whole of a table that must have these columns. Raises MissingColumn or DataError."""
    return open_table(path, (), columns).read()


@contextmanager
def readable_rows(tables: Sequence[Table]) -> Iterator[None]:
    """Turn an error while rows of these tables are read into a DataError that names the row, where one is at fault."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        if is_full_disk(error):
            raise
        for table in tables:
            table.refuse_unreadable(list(table.schema))
        raise unreadable(", ".join(str(table.path) for table in tables), error) from error


def write_dataset(
    out: Path,
    name: str,
    tables: dict[str, pl.LazyFrame | pl.DataFrame],
    described: dict[str, Any],
    sources: Sequence[Table] = (),
) -> dict[str, Any]:
    """Write the folder in one atomic step; the content of its dataset.json.

    tables: ``events``, ``items`` and, where there are any, ``impressions``. sources: what they are read from, so that a
    cell that cannot be read is named. Raises DataError for such a cell and when there are no events, and StaleOutput
    when ``out`` is not an empty or new folder.
    """
    with new_folder(out) as folder:
        with Progress(f"{name}: converting", total=len(tables), unit="tables") as progress:
            for part, table in tables.items():
                with readable_rows(sources):
                    table.lazy().sink_parquet(folder / f"{part}.parquet")
                progress.advance()
        summary = {"name": name, **described, **_statistics(folder)}
        if not summary["num_events"]:
            raise DataError(f"{name}: no events are left ({described}); relax the filters or check the source")
        (folder / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _statistics(folder: Path) -> dict[str, Any]:
    """Sizes and period of what was written."""
    time = pl.col("timestamp")
    facts = {
        "num_users": pl.col("user_id").n_unique(),
        "num_items": pl.col("item_id").n_unique(),
        "num_events": pl.len(),
        "first_timestamp": time.min(),
        "last_timestamp": time.max(),
    }
    events = pl.scan_parquet(folder / "events.parquet", glob=False)
    found = events.select(**facts).collect(engine="streaming").row(0, named=True)
    shown = folder / "impressions.parquet"
    if shown.exists():
        rows = pl.scan_parquet(shown, glob=False).select(pl.len()).collect()
        found["num_impressions"] = rows.item()
    return found
