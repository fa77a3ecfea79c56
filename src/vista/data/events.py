"""The event log as it comes: Parquet or CSV files, opened, checked and brought to one form, without reading it whole.

The one form is a lazy table with the columns

    user_id, item_id   Int64 or String
    ticks              Int64, time in units of ``Clock.tick_us`` microseconds since 1970-01-01 UTC
    action             the original value, where there are actions
    burst, event_id    UInt64, a hash of the original value (null where it is null), where those columns are given
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.tables import LARGEST_ID, Table, find_files, id_kind, is_full_disk, text_ids, unreadable
from vista.errors import ConfigError, DataError

UNITS_US = {"s": 1_000_000, "ms": 1_000, "us": 1}  # microseconds in a unit; "ns" is the one below a microsecond
# Epoch times of one instant differ by 1000 from unit to unit. Seconds reach this bound in the year 5138, and
# milliseconds pass it in 1973, before any event log: no time of an actual log is ambiguous.
LARGEST_SECONDS = 10**11
EARLIEST = "1990-01-01"  # no event log is older; what looks older is a wrong column or unit
LATEST_YEARS_AHEAD = 10  # clocks may be wrong and events planned, but not by that much
US_PER_YEAR = 31_556_952_000_000  # the mean Gregorian year


@dataclass(frozen=True)
class EventColumns:
    """Names of the event log's columns. action None: ``action`` where there is such a column."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    action: str | None = None
    burst: str | None = None
    event_id: str | None = None


@dataclass(frozen=True)
class TimeRules:
    """How timestamps are to be understood. unit: s, ms, us, ns or None to infer it from their magnitude.

    earliest, latest: times outside are refused; dates, or epoch numbers in the unit of the table. latest None: ten
    years from now.
    """

    unit: str | None = None
    earliest: str = EARLIEST
    latest: str | None = None


@dataclass(frozen=True)
class Clock:
    """What the numbers or texts in a timestamp column mean.

    kind: ``number``, ``datetime`` or ``text``. unit: of numbers (and of text that holds numbers), else empty.
    """

    kind: str
    unit: str
    statement: str
    is_float: bool = False

    @property
    def tick_us(self) -> int:
        """Microseconds per tick. Whole seconds stay seconds: smaller numbers sort faster."""
        return 1 if self.is_float or self.kind == "datetime" else UNITS_US.get(self.unit, 1)

    def ticks(self, column: str, dtype: pl.DataType) -> pl.Expr:
        """The column in ticks, Int64; null where it cannot be read."""
        value = pl.col(column)
        if self.kind == "datetime":
            if dtype == pl.String:
                return value.str.to_datetime(time_unit="us", time_zone="UTC", strict=False).dt.timestamp("us")
            return value.cast(pl.Datetime("us")).dt.timestamp("us") if dtype == pl.Date else value.dt.timestamp("us")
        if self.is_float:
            number = value.cast(pl.Float64, strict=False)
            scaled = number / 1000 if self.unit == "ns" else number * UNITS_US[self.unit]
            return scaled.round().cast(pl.Int64, strict=False)
        number = value.cast(pl.Int64, strict=False)
        return number // 1000 if self.unit == "ns" else number

    def parse_us(self, text: str | int | float, option: str) -> int:
        """A time given on the command line, in microseconds. Raises ConfigError.

        text: a date or date and time (UTC unless it says otherwise), or a number in the unit of the table.
        """
        try:
            number = float(text)
        except ValueError:
            return parse_datetime_us(str(text), option)
        if self.kind != "number":
            raise ConfigError(f"{option} {text}: the timestamps are dates; give a date such as 2024-01-31T12:00")
        return int(number // 1000 if self.unit == "ns" else number * UNITS_US[self.unit])


def parse_datetime_us(text: str, option: str) -> int:
    """An ISO 8601 date or date and time, UTC unless it says otherwise, in microseconds. Raises ConfigError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: not a date (such as 2024-01-31 or 2024-01-31T12:00+01:00)") from error
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def format_us(time_us: int) -> str:
    """A time in microseconds as people read it, UTC."""
    try:
        return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{time_us / US_PER_YEAR:+.0f} years from 1970"


def open_clock(tables: Sequence[Table], column: str, rules: TimeRules) -> Clock:
    """Find out what a timestamp column means and check each of its values.

    Raises DataError naming file and row of a time that is null, cannot be read, or lies outside the rules.
    """
    clock = _infer_clock(tables, column, rules.unit)
    low_us = clock.parse_us(rules.earliest, "--earliest")
    now_us = parse_datetime_us(datetime.now(UTC).isoformat(), "now")
    high_us = (
        now_us + LATEST_YEARS_AHEAD * US_PER_YEAR if rules.latest is None else clock.parse_us(rules.latest, "--latest")
    )
    low, high = -(-low_us // clock.tick_us), high_us // clock.tick_us
    ticks = pl.concat([table.scan().select(clock.ticks(column, table.schema[column]).alias("t")) for table in tables])
    first, last, unread = ticks.select(
        pl.col("t").min().alias("first"), pl.col("t").max().alias("last"), pl.col("t").null_count().alias("unread")
    ).collect(engine="streaming").row(0)  # fmt: skip
    if unread or first is None or first < low or last > high:
        for table in tables:
            value = clock.ticks(column, table.schema[column])
            table.refuse_where(value.is_null(), column, f"is not a time ({clock.statement})")
            found = table.first_row((value < low) | (value > high), pl.col(column).cast(pl.String), value)
            if found is not None:
                row, (text, tick) = found
                raise DataError(
                    f"{table.path}, row {row}, column {column!r}: {text} is {format_us(tick * clock.tick_us)} "
                    f"({clock.statement}), outside {format_us(low_us)} .. {format_us(high_us)}. If the unit is wrong, "
                    "give --time-unit; if such times are right, --earliest or --latest; else remove the row"
                )
    return clock


def _infer_clock(tables: Sequence[Table], column: str, unit: str | None) -> Clock:
    """The kind of the column from its type, the unit of numbers from their size."""
    if unit is not None and unit not in (*UNITS_US, "ns"):
        raise ConfigError(f"--time-unit {unit}: one of s, ms, us, ns")
    kinds = {_time_kind(table, column) for table in tables}
    if len(kinds) > 1:
        raise DataError(
            f"column {column!r}: numbers in some files, dates in others ({tables[0].path} ...); convert one of them"
        )
    kind = kinds.pop()
    if kind == "datetime":
        return Clock("datetime", "", "dates; those without a time zone are taken as UTC")
    is_float = any(table.schema[column].is_float() for table in tables)
    number = pl.Float64 if is_float else pl.Int64
    if unit is not None:
        return Clock("number", unit, f"epoch numbers in {unit}, as given by --time-unit", is_float)
    values = pl.concat([table.scan().select(pl.col(column).cast(number, strict=False).alias("t")) for table in tables])
    unit = _likely_unit(values)
    return Clock("number", unit, f"epoch numbers in {unit}, inferred from their size", is_float)


def _time_kind(table: Table, column: str) -> str:
    dtype = table.schema[column]
    if dtype == pl.String:
        sample = table.scan().select(pl.col(column).drop_nulls().head(1)).collect().to_series()
        is_number = len(sample) and sample.cast(pl.Int64, strict=False).null_count() == 0
        return "number" if is_number else "datetime"
    if dtype.is_numeric():
        return "number"
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return "datetime"
    raise DataError(f"{table.path}, column {column!r}: type {dtype} is not a time; give epoch numbers or dates")


def _likely_unit(values: pl.LazyFrame) -> str:
    """The unit that most values of column ``t`` have by their size: a few wrong ones are found out, not believed."""
    units = (*UNITS_US, "ns")
    size = pl.col("t").abs()
    below = [(size < LARGEST_SECONDS * 1000**power).sum().alias(unit) for power, unit in enumerate(UNITS_US)]
    counts = values.select(*below, pl.col("t").count().alias("ns")).collect(engine="streaming").row(0)
    in_unit = [count - smaller for count, smaller in zip(counts, (0, *counts), strict=False)]
    return units[in_unit.index(max(in_unit))]


@dataclass(frozen=True)
class Survey:
    """What there is in the event log.

    users: columns user_id, num_events; items: column item_id; both sorted by id. actions: the values by first
    appearance in time, so that one which appears later changes no other's place.
    """

    users: pl.DataFrame
    items: pl.DataFrame
    actions: tuple[Any, ...]
    num_events: int


@dataclass(frozen=True)
class EventLog:
    """An opened event log; nothing of it is held in memory."""

    tables: tuple[Table, ...]
    columns: EventColumns
    user_type: pl.DataType
    item_type: pl.DataType
    action_type: pl.DataType | None
    clock: Clock

    @classmethod
    def open(cls, source: Path | str, columns: EventColumns, rules: TimeRules) -> EventLog:
        """Find the files, check columns, types and timestamps. Raises DataError, MissingColumn or ConfigError."""
        files = find_files(source, "events")
        tables = [Table.open(file) for file in files]
        for table in tables:
            table.require(_required(columns))
        as_text = text_ids(tables, (columns.user, columns.item))
        if as_text:
            tables = [Table.open(table.path, as_text) for table in tables]
        with explained(tables, columns):
            return cls(
                tuple(tables), columns, id_kind(tables, columns.user), id_kind(tables, columns.item),
                _action_type(tables, columns.action), open_clock(tables, columns.timestamp, rules),
            )  # fmt: skip

    @property
    def has_actions(self) -> bool:
        return self.action_type is not None

    def lazy(self) -> pl.LazyFrame:
        """The whole log in the one form (see the top of this module), in input order."""
        return pl.concat([self._normalized(table) for table in self.tables])

    def _normalized(self, table: Table) -> pl.LazyFrame:
        names, chosen = self.columns, []
        chosen.append(pl.col(names.user).cast(self.user_type).alias("user_id"))
        chosen.append(pl.col(names.item).cast(self.item_type).alias("item_id"))
        chosen.append(self.clock.ticks(names.timestamp, table.schema[names.timestamp]).alias("ticks"))
        if self.action_type is not None:
            action = pl.col(names.action or "action").cast(self.action_type)
            chosen.append((action.fill_nan(None) if self.action_type.is_float() else action).alias("action"))
        for alias in ("burst", "event_id"):
            column = getattr(names, alias)
            if column is not None:
                chosen.append(_hashed(pl.col(column), table.schema[column]).alias(alias))
        return table.scan().select(chosen)

    def survey(self) -> Survey:
        """Users, items and actions. Raises DataError for null ids and for a log without rows.

        A pass for each, which reads one column and streams: polars would keep what one pass for all has in common.
        """
        log = self.lazy()
        queries = [
            log.group_by("user_id").agg(pl.len().cast(pl.Int64).alias("num_events")),
            log.group_by("item_id").agg(),
        ]
        if self.has_actions:
            queries.append(log.group_by("action").agg(pl.col("ticks").min()))
        with explained(self.tables, self.columns):
            users, items, *rest = [query.collect(engine="streaming") for query in queries]
        for frame, column in ((users, self.columns.user), (items, self.columns.item)):
            if frame.to_series(0).null_count():
                self._refuse_null(column)
        if not len(users):
            raise DataError(f"{self.tables[0].path}: the event log has no rows")
        actions = rest[0].drop_nulls("action").sort("ticks", "action")["action"].to_list() if rest else []
        if len(actions) > 2**15 - 1:
            raise DataError(
                f"column {self.columns.action or 'action'!r} has {len(actions)} different values; an action is a "
                "kind of event, of which there are at most 32767: name another column with --action-column"
            )
        return Survey(users.sort("user_id"), items.sort("item_id"), tuple(actions), int(users["num_events"].sum()))

    def _refuse_null(self, column: str) -> None:
        for table in self.tables:
            table.refuse_where(pl.col(column).is_null(), column, "is not an id; fill it in or remove the row")


@contextmanager
def explained(tables: Sequence[Table], columns: EventColumns) -> Iterator[None]:
    """Turn an error of polars while it reads the log into a DataError that names file, row and column, where it can."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        if is_full_disk(error):
            raise
        for table in tables:
            unnamed = ["action"] if columns.action is None and "action" in table.schema else []
            table.refuse_unreadable([*_required(columns), *unnamed])
            for column in (columns.user, columns.item):
                if table.schema[column] == pl.UInt64:
                    too_large = f"is above the largest integer id, {LARGEST_ID}; convert the column to strings"
                    table.refuse_where(pl.col(column) > LARGEST_ID, column, too_large)
        raise unreadable(", ".join(str(table.path) for table in tables[:3]), error) from error


def _required(columns: EventColumns) -> dict[str, str]:
    named = {
        columns.user: "--user-column", columns.item: "--item-column", columns.timestamp: "--timestamp-column",
        columns.action: "--action-column", columns.burst: "--burst-column", columns.event_id: "--event-id-column",
    }  # fmt: skip
    return {name: option for name, option in named.items() if name is not None}


def _action_type(tables: Sequence[Table], named: str | None) -> pl.DataType | None:
    """The common type of the action column, or None where there is none."""
    column = named or "action"
    if named is None and not all(column in table.schema for table in tables):
        return None
    types = [table.schema[column] for table in tables]
    if all(dtype.is_integer() or dtype == pl.Boolean for dtype in types):
        return pl.Int64()
    if all(dtype.is_numeric() or dtype == pl.Boolean for dtype in types):
        return pl.Float64()
    if any(dtype.is_nested() or dtype.is_temporal() for dtype in types):
        raise DataError(f"column {column!r}: type {types[0]} is not an action; integers or short strings are")
    return pl.String()


def _hashed(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """A 64-bit hash of any value, null kept. Only ever compared within one user: a collision is out of the question."""
    plain = value.cast(pl.String) if dtype in (pl.Categorical, pl.Enum) else value
    if dtype.is_integer():  # files may differ in width
        plain = plain.reinterpret(signed=True) if dtype == pl.UInt64 else plain.cast(pl.Int64)
    return pl.when(value.is_not_null()).then(plain.hash(0))
