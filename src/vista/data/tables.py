"""Input tables (Parquet or CSV; a file, a folder or a glob): found, opened, checked; a bad cell named by file and row.

Rows are counted from 1, a CSV file's header not counted.
"""

from __future__ import annotations

import csv
import errno
import glob
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from vista.errors import DataError, MissingColumn, nearest

PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
LARGEST_ID = 2**63 - 1  # ids are int64 or strings
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: a limit on the size of files, of user or file system
FULL_DISK_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
)  # of polars, which has no numbers
INFER_ROWS = 10_000  # of a CSV file are looked at to guess its types; a guess that fails later is reported with its row


def find_files(source: Path | str, what: str) -> list[Path]:
    """The table files a path, folder or glob stands for, in order of name. Raises DataError when there are none."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
        files = [p for p in found if table_kind(p)]
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
    if not files:
        raise DataError(
            f"{source}: no {what} there; give a Parquet or CSV file, a folder of them, or a quoted glob "
            "('logs/*.parquet')"
        )
    for file in files:
        if table_kind(file) is None:
            raise DataError(f"{file}: neither Parquet nor CSV by its name; known: {_known_suffixes()}")
    return files


def table_kind(path: Path) -> str | None:
    """``parquet``, ``csv`` or None, by the file's name."""
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "csv" if name.endswith(CSV_SUFFIXES) else None


def _known_suffixes() -> str:
    return ", ".join(PARQUET_SUFFIXES + CSV_SUFFIXES)


@dataclass(frozen=True)
class Table:
    """One input file: its path and its columns with their types.

    as_text: CSV columns to be read as strings. header: names of the columns of a CSV file that has no header.
    """

    path: Path
    schema: dict[str, pl.DataType]
    as_text: tuple[str, ...] = ()
    header: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, as_text: Sequence[str] = (), header: Sequence[str] = ()) -> Table:
        """Read the file's schema. Raises DataError when the file is empty, truncated or unreadable."""
        table = cls(path, {}, tuple(as_text), tuple(header))
        with readable(path):
            schema = dict(table.scan().collect_schema())
        return replace(table, schema=schema)

    @property
    def separator(self) -> str:
        """Of a CSV file."""
        return "\t" if ".tsv" in self.path.name.lower() else ","

    def scan(self) -> pl.LazyFrame:
        """The table, not read yet."""
        if table_kind(self.path) == "parquet":
            return pl.scan_parquet(self.path, glob=False)
        return self.scan_csv(dict.fromkeys(self.as_text, pl.String()))

    def scan_csv(self, types: dict[str, pl.DataType]) -> pl.LazyFrame:
        """A CSV table with the types of some columns given, those of the others guessed."""
        return pl.scan_csv(
            self.path, separator=self.separator, try_parse_dates=True, infer_schema_length=INFER_ROWS,
            schema_overrides=types, glob=False, has_header=not self.header, new_columns=list(self.header) or None,
        )  # fmt: skip

    def read(self) -> pl.DataFrame:
        """The whole table. Raises DataError naming the row or cell that cannot be read, where that is the reason."""
        try:
            return self.scan().collect()
        except pl.exceptions.PolarsError as error:
            self.refuse_unreadable(list(self.schema))
            raise unreadable(self.path, error) from error

    def require(self, columns: dict[str, str]) -> None:
        """Raise MissingColumn unless all columns are there; ``columns`` maps a name to the option that sets it."""
        for name, option in columns.items():
            if name not in self.schema:
                raise MissingColumn(
                    f"{self.path}: no column {name!r}{nearest(name, self.schema)}. Name the right one with {option}"
                )

    def first_row(self, condition: pl.Expr, *shown: pl.Expr) -> tuple[int, tuple[Any, ...]] | None:
        """The first row (from 1) where the condition holds, and the shown values in it; None when there is none."""
        with readable(self.path):
            found = (
                self.scan()
                .with_row_index("row_number")
                .filter(condition)
                .select("row_number", *(value.alias(f"shown_{i}") for i, value in enumerate(shown)))
                .head(1)
                .collect()
            )
        if not len(found):
            return None
        row, *values = found.row(0)
        return row + 1, tuple(values)

    def refuse_where(self, condition: pl.Expr, column: str, problem: str) -> None:
        """Raise DataError naming file, row, column and value of the first row where the condition holds."""
        found = self.first_row(condition, pl.col(column).cast(pl.String, strict=False))
        if found is not None:
            row, (value,) = found
            raise DataError(f"{self.path}, row {row}, column {column!r}: {_quoted(value)} {problem}")

    def refuse_unreadable(self, columns: Sequence[str]) -> None:
        """Raise DataError for the first row of a CSV file that has too many cells, or a cell of the wrong type."""
        row = self._long_row()
        if row is not None:
            raise DataError(
                f"{self.path}, row {row}: more cells than the {len(self.schema)} columns of the header; correct or "
                'remove it (text with a separator in it needs quotes: "a, b")'
            )
        cell = self.unreadable_cell(columns)
        if cell is not None:
            raise DataError(
                f"{cell} is not {self.schema[cell.column]}, as the rows before it are; correct or remove it"
            )

    def _long_row(self) -> int | None:
        if table_kind(self.path) != "csv":
            return None
        opener = gzip.open if self.path.name.lower().endswith(".gz") else open
        try:
            with opener(self.path, "rt", encoding="utf-8", errors="replace", newline="") as file:
                for row, cells in enumerate(csv.reader(file, delimiter=self.separator), 1 if self.header else 0):
                    if len(cells) > len(self.schema):
                        return row
        except (csv.Error, EOFError):  # what is wrong is something else
            pass
        return None

    def has_other_than_integers(self, column: str) -> bool:
        """Whether a CSV column whose first rows suggest integers holds what is not one as Python prints it."""
        if table_kind(self.path) != "csv" or not self.schema[column].is_integer():
            return False
        text = pl.col(column)
        printed = text.cast(self.schema[column], strict=False).cast(pl.String)
        found = replace(self, as_text=(column,)).first_row(text.is_not_null() & printed.ne_missing(text))
        return found is not None

    def unreadable_cell(self, columns: Sequence[str]) -> BadCell | None:
        """The first cell of a CSV column that is not of the type its first rows suggest; None for Parquet."""
        if table_kind(self.path) != "csv":
            return None
        texts = replace(self, as_text=tuple(columns))
        for column in columns:
            text, dtype = pl.col(column), self.schema[column]
            if dtype == pl.String:
                continue
            parsed = text.cast(dtype, strict=False) if dtype.is_numeric() else text.str.to_datetime(strict=False)
            found = texts.first_row(text.is_not_null() & parsed.is_null(), text)
            if found is not None:
                return BadCell(self.path, column, found[0], found[1][0])
        return None


@dataclass(frozen=True)
class BadCell:
    """A cell that cannot be read as what its column holds."""

    path: Path
    column: str
    row: int
    value: Any = field(default=None)

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}, column {self.column!r}: {_quoted(self.value)}"


def _quoted(value: Any) -> str:
    return "null" if value is None else repr(value)


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn an error of the reader into a DataError that names the file."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        if is_full_disk(error):
            raise
        raise unreadable(path, error) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether this is how Python or polars says that nothing more can be written."""
    number = error.errno if isinstance(error, OSError) else None
    return number in FULL_DISK or any(text in str(error) for text in FULL_DISK_TEXTS)


def unreadable(path: Path | str, error: Exception) -> DataError:
    """The DataError for a file that the reader gave up on."""
    if isinstance(error, pl.exceptions.NoDataError):
        return DataError(f"{path}: the file is empty; there must be a header and at least one row")
    hint = " (truncated?)" if "parquet" in str(error).lower() else ""
    reason = str(error).strip().splitlines()[0]
    return DataError(f"{path}: cannot be read{hint}: {reason}. Check or re-create the file")


def id_kind(tables: Sequence[Table], column: str) -> pl.DataType:
    """Int64 when the column holds integers in all tables, String when in some it holds text.

    Raises DataError for any other type.
    """
    kinds = set()
    for table in tables:
        dtype = table.schema[column]
        if dtype.is_integer():
            kinds.add("integer")
        elif dtype in (pl.String, pl.Categorical, pl.Enum):
            kinds.add("string")
        else:
            raise DataError(f"{table.path}, column {column!r}: type {dtype}; ids are integers or strings: convert them")
    return pl.String() if "string" in kinds else pl.Int64()


def text_ids(tables: Sequence[Table], columns: Sequence[str]) -> list[str]:
    """Those of some id columns that are to be read as text.

    CSV files say nothing of types: where an id is text in one file or later in a file, it is text in all. So it is
    where one is no integer as it is written: 007 is another id than 7, and who asks for 007 later must find it.
    """
    return [
        column
        for column in columns
        if any(
            table.schema[column] == pl.String or table.has_other_than_integers(column)
            for table in tables
            if column in table.schema
        )
    ]


def read_table(path: Path | str, what: str, ids: Sequence[str] = ()) -> tuple[list[Table], pl.DataFrame]:
    """A table that fits in memory, all its files one after another, and where its rows come from.

    ids: its id columns. Raises DataError when it is empty or its files do not have the same columns.
    """
    tables = [Table.open(file) for file in find_files(path, what)]
    as_text = text_ids(tables, ids)
    if as_text:
        tables = [Table.open(table.path, as_text) for table in tables]
    for table in tables[1:]:
        if list(table.schema) != list(tables[0].schema):
            raise DataError(
                f"{table.path}: columns {list(table.schema)}, {tables[0].path} has {list(tables[0].schema)}"
            )
    frames = [table.read() for table in tables]
    with readable(path):
        frame = pl.concat(frames, how="vertical_relaxed")
    if not len(frame):
        raise DataError(f"{path}: no rows in the {what} table")
    return tables, frame


def place_of(tables: Sequence[Table], row: int) -> str:
    """``FILE, row R`` of row ``row`` (from 0) of tables read one after another; reads lengths, so only for messages."""
    for table in tables[:-1]:
        length = table.scan().select(pl.len()).collect().item()
        if row < length:
            return f"{table.path}, row {row + 1}"
        row -= length
    return f"{tables[-1].path}, row {row + 1}"
