"""The impressions table: what was shown to whom and what came of it, as the log of a service has it.

One row per shown candidate: user, item, timestamp, one 0/1 column per task, and context columns where they are named.
The rows of one user at one time are one request. A column ``best_score`` (or ``best_score_TASK`` for each task) holds
the true probabilities, which only synthetic worlds know. The table must fit in memory, at some 60 bytes per row.

Shape letters: R requests, M impressions, T tasks, X context columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from vista.catalogue import hash_ids
from vista.data.arrays import search_ranges
from vista.data.events import EventLog, TimeRules, open_clock
from vista.data.items import cast_ids
from vista.data.sort import SortedLog, Vocabulary
from vista.data.split import RequestTable
from vista.data.tables import Table, place_of, read_table
from vista.errors import ConfigError, DataError
from vista.schema import NUM_CONTEXT_BUCKETS, SOURCES, ContextColumn

BEST_SCORE = "best_score"


@dataclass(frozen=True)
class ImpressionTable:
    """The table in memory, one row per impression in input order.

    timestamp_us (M,), label (M, T) int8, context (M, X) float32 (NaN = not given), best_score (M, T) float32 or None.
    unused: columns that were not named and are not 0/1.
    """

    user_id: pl.Series
    item_id: pl.Series
    timestamp_us: np.ndarray
    label: np.ndarray
    context: np.ndarray
    tasks: tuple[str, ...]
    context_kinds: dict[str, str] = field(default_factory=dict)
    best_score: np.ndarray | None = None
    unused: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, path: Path | str, log: EventLog, rules: TimeRules, tasks: Sequence[str] = (), context: Sequence[str] = ()
    ) -> ImpressionTable:
        """Read the table; its id and time columns are named as in the event log.

        tasks: names of the 0/1 columns; default: every column that holds nothing but 0 and 1 and is not context.
        Raises MissingColumn, and DataError naming file and row of a label that is not 0 or 1, of a context number that
        is infinite, and of ids and times as for the event log.
        """
        names = log.columns
        tables, frame = read_table(path, "impressions", (names.user, names.item))
        options = {names.user: "--user-column", names.item: "--item-column", names.timestamp: "--timestamp-column"}
        tables[0].require({**options, **dict.fromkeys(tasks, "--task"), **dict.fromkeys(context, "--context")})
        if set(tasks) & set(context):
            raise ConfigError(f"{sorted(set(tasks) & set(context))[0]!r} is named as --task and as --context")
        clock = open_clock(tables, names.timestamp, rules)
        ticks = frame.select(clock.ticks(names.timestamp, frame.schema[names.timestamp])).to_series()
        free = [n for n in frame.columns if n not in (*options, *context) and not n.startswith(BEST_SCORE)]
        chosen = tuple(tasks) or tuple(name for name in free if _is_label(frame[name]))
        if not chosen:
            raise DataError(
                f"{tables[0].path}: no column holds nothing but 0 and 1; name the label columns with --task "
                f"(there is: {', '.join(free) or 'none left'})"
            )
        columns = [_context(tables, frame[name]) for name in context]
        return cls(
            cast_ids(tables, frame, names.user, log.user_type), cast_ids(tables, frame, names.item, log.item_type),
            ticks.to_numpy() * clock.tick_us, np.column_stack([_labels(tables, frame[name]) for name in chosen]),
            np.column_stack([values for _, values in columns]) if columns else np.zeros((len(frame), 0), np.float32),
            chosen, {name: kind for name, (kind, _) in zip(context, columns, strict=True)},
            _best_score(tables, frame, chosen), tuple(name for name in free if name not in chosen),
        )  # fmt: skip

    def requests(self, log: SortedLog, vocabulary: Vocabulary) -> RequestTable:
        """Grouped in requests and sorted by user and time, with codes for ids; equal times keep the order of rows."""
        user, item = vocabulary.user_codes(self.user_id), vocabulary.item_codes(self.item_id)
        order = np.lexsort((self.timestamp_us, user))
        user, time_us = user[order], self.timestamp_us[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(user) != 0) | (np.diff(time_us) != 0)
        first = np.flatnonzero(is_first)
        return RequestTable(
            user[first], time_us[first], count_known(log, user[first], time_us[first]), np.append(first, len(order)),
            item[order], self.label[order], np.full(len(order), SOURCES.index("given"), np.int8), self.context[order],
            None if self.best_score is None else self.best_score[order],
        )  # fmt: skip

    def described_context(self, is_train: np.ndarray) -> tuple[ContextColumn, ...]:
        """The context columns, with mean and standard deviation over the rows (M,) of the train split."""
        described = []
        for number, (name, kind) in enumerate(self.context_kinds.items()):
            values = self.context[is_train, number].astype(np.float64)
            values = values[~np.isnan(values)]
            if kind == "category" or not len(values):
                described.append(ContextColumn(name, kind))
            else:
                described.append(ContextColumn(name, kind, float(values.mean()), float(values.std()) or 1.0))
        return tuple(described)


def count_known(log: SortedLog, user: np.ndarray, time_us: np.ndarray) -> np.ndarray:
    """Events of each request's user strictly before its time, (R,) int64. user: (R,) codes, sorted."""
    known = np.zeros(len(user), np.int64)
    for chunk in log.chunks():
        rows = slice(*np.searchsorted(user, [chunk.first_user, chunk.end_user]))
        place = user[rows] - chunk.first_user
        first, end = chunk.offsets[place], chunk.offsets[place + 1]
        known[rows] = search_ranges(chunk.timestamp_us, first, end, time_us[rows]) - first
    return known


def _is_label(column: pl.Series) -> bool:
    if not (column.dtype.is_integer() or column.dtype == pl.Boolean):
        return False
    return bool(column.null_count() == 0 and column.cast(pl.Int64).is_in([0, 1]).all())


def _labels(tables: Sequence[Table], column: pl.Series) -> np.ndarray:
    """(M,) int8. Raises DataError naming the row of a value that is not 0 or 1."""
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise DataError(f"{tables[0].path}, column {column.name!r}: type {column.dtype}; a label is 0 or 1")
    wrong = (~column.cast(pl.Float64).is_in([0.0, 1.0]).fill_null(False)).arg_true()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{place_of(tables, row)}, column {column.name!r}: {column[row]} is not a label; labels are 0 or 1, and an "
            "impression whose outcome is not known is left out"
        )
    return column.cast(pl.Int8).to_numpy()


def _context(tables: Sequence[Table], column: pl.Series) -> tuple[str, np.ndarray]:
    """Kind and values (M,) float32 of a context column: numbers as they are, anything else as hash buckets."""
    if column.dtype.is_float() or column.dtype.is_integer():
        values = column.cast(pl.Float32).to_numpy().astype(np.float32)  # null becomes NaN
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise DataError(f"{place_of(tables, int(infinite[0]))}, column {column.name!r}: not a finite number")
        return "number", values
    if column.dtype not in (pl.String, pl.Boolean, pl.Categorical, pl.Enum):
        raise DataError(f"{tables[0].path}, column {column.name!r}: type {column.dtype}; context is numbers or strings")
    text = column.cast(pl.String)
    distinct = text.drop_nulls().unique()
    buckets = (hash_ids(distinct.to_numpy().astype(object)) % np.uint64(NUM_CONTEXT_BUCKETS)).astype(np.float32)
    table = pl.DataFrame({"value": distinct, "bucket": buckets})
    joined = text.to_frame("value").join(table, on="value", how="left", maintain_order="left")["bucket"]
    return "category", joined.to_numpy().astype(np.float32)


def _best_score(tables: Sequence[Table], frame: pl.DataFrame, tasks: tuple[str, ...]) -> np.ndarray | None:
    """(M, T) float32 where there is a true probability for each task, else None."""
    names = [f"{BEST_SCORE}_{task}" for task in tasks]
    if len(tasks) == 1 and BEST_SCORE in frame.columns:
        names = [BEST_SCORE]
    if not all(name in frame.columns for name in names):
        return None
    scores = frame.select(pl.col(names).cast(pl.Float32)).to_numpy()
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)).all(1))
    if len(wrong):
        raise DataError(f"{place_of(tables, int(wrong[0]))}, column {names[0]!r}: not a probability from 0 to 1")
    return np.ascontiguousarray(scores, np.float32)
