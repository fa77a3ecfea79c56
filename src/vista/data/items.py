"""The items table, and the catalogue made from it and from the event log.

Shape letters: V items, I item indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.catalogue import Catalogue, unknown_rows
from vista.data.tables import Table, place_of, read_table
from vista.errors import ConfigError, DataError, nearest

# A column with more different values than this share of its rows names items, not kinds of them
MAX_IDENTIFIER_SHARE = 0.5
MIN_IDENTIFIER_VALUES = 100  # in a small table many values may still be kinds


@dataclass(frozen=True)
class ItemTable:
    """The static features of items, one row per id. ignored: columns that are no features, and why."""

    ids: pl.Series
    categories: dict[str, pl.Series] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | str, id_column: str, id_type: pl.DataType, features: Sequence[str] = ()) -> ItemTable:
        """Read the table. features: only these columns; default: every column that can be one.

        Raises MissingColumn, and DataError for ids that are null, repeated or of another type than in the event log,
        for vectors of different widths and for numbers that are not finite.
        """
        tables, frame = read_table(path, "items", [id_column])
        options = {id_column: "--item-column", **dict.fromkeys(features, "--item-feature")}
        tables[0].require(options)
        ids = cast_ids(tables, frame, id_column, id_type)
        repeated = ids.is_duplicated().arg_true()
        if len(repeated):
            row = int(repeated[0])
            raise DataError(
                f"{place_of(tables, row)}: item {ids[row]!r} is there more than once; keep one row per item"
            )
        table = cls(ids)
        for name in features or [name for name in frame.columns if name != id_column]:
            table._add(tables, frame[name], is_named=bool(features))
        return table

    def _add(self, tables: Sequence[Table], column: pl.Series, is_named: bool) -> None:
        dtype = column.dtype
        if isinstance(dtype, pl.List | pl.Array) and dtype.inner.is_numeric():
            self.vectors[column.name] = _vectors(tables, column)
        elif dtype.is_float():
            numbers = column.cast(pl.Float32).fill_null(0.0).to_numpy()[:, None]
            self.vectors[column.name] = _all_finite(tables, column.name, numbers)
        elif dtype.is_integer() or dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum):
            num_values = column.n_unique()
            if not is_named and num_values > max(MIN_IDENTIFIER_VALUES, MAX_IDENTIFIER_SHARE * len(column)):
                self.ignored[column.name] = f"{num_values} different values in {len(column)} rows: an identifier"
            else:
                is_text = dtype in (pl.String, pl.Categorical, pl.Enum)
                self.categories[column.name] = column.cast(pl.String if is_text else pl.Int64)
        elif is_named:
            raise DataError(
                f"{tables[0].path}, column {column.name!r}: type {dtype}; a feature is an integer, a string, or numbers"
            )
        else:
            self.ignored[column.name] = f"type {dtype}"


def cast_ids(tables: Sequence[Table], frame: pl.DataFrame, column: str, id_type: pl.DataType) -> pl.Series:
    """A table's ids, of the type they have in the event log. Raises DataError naming the row of one that cannot be."""
    original = frame[column]
    if original.dtype.is_float() or original.dtype.is_nested() or original.dtype.is_temporal():
        raise DataError(f"{tables[0].path}, column {column!r}: type {original.dtype}; ids are integers or strings")
    ids = original.cast(id_type, strict=False)
    is_other = ids.is_null()
    if original.dtype == pl.String:
        is_other |= ids.cast(pl.String) != original  # 007 is another id than 7
    wrong = is_other.arg_true()
    if len(wrong):
        row = int(wrong[0])
        kind = "an integer, as the ids of the event log are" if id_type == pl.Int64 else "an id"
        raise DataError(f"{place_of(tables, row)}, column {column!r}: {original[row]!r} is not {kind}")
    return ids


def _vectors(tables: Sequence[Table], column: pl.Series) -> np.ndarray:
    """(n, width) float32, zeros for null. Raises DataError naming the row of a wrong one."""
    lists = column.cast(pl.List(pl.Float32))
    widths = lists.list.len()
    width = int(widths.max() or 0)  # type: ignore[arg-type]
    if not width:
        raise DataError(f"{tables[0].path}, column {column.name!r}: vectors without numbers; remove the column")
    wrong = ((widths != width) & widths.is_not_null()).arg_true()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{place_of(tables, row)}, column {column.name!r}: a vector of {widths[row]} numbers, others have {width}"
        )
    vectors = np.zeros((len(lists), width), np.float32)
    there = lists.is_not_null().to_numpy()
    vectors[there] = lists.drop_nulls().explode().fill_null(np.nan).to_numpy().reshape(-1, width)
    return _all_finite(tables, column.name, vectors)


def _all_finite(tables: Sequence[Table], name: str, vectors: np.ndarray) -> np.ndarray:
    """The vectors, (n, width). Raises DataError naming the row of one that is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise DataError(f"{place_of(tables, int(bad[0]))}, column {name!r}: a number that is null or not finite")
    return vectors


@dataclass(frozen=True)
class ItemFeatures:
    """Features by item code: categories (V,) int32 with 0 = unknown, their original values, vectors (V, width)."""

    categories: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, table: ItemTable, codes: np.ndarray, num_items: int) -> ItemFeatures:
        """Spread a table's rows over all items; codes: the item code of each row."""
        features = cls()
        for name, column in table.categories.items():
            values = column.drop_nulls().unique().sort()
            index = pl.DataFrame({"value": values, "code": np.arange(1, len(values) + 1, dtype=np.int32)})
            joined = column.to_frame("value").join(index, on="value", how="left", maintain_order="left")
            features.categories[name] = np.zeros(num_items, np.int32)
            features.categories[name][codes] = joined["code"].fill_null(0).to_numpy()
            features.values[name] = tuple(values.to_list())
        for name, vectors in table.vectors.items():
            features.vectors[name] = np.zeros((num_items, vectors.shape[1]), np.float32)
            features.vectors[name][codes] = vectors
        return features


def category_name(features: Iterable[str], named: str | None) -> str | None:
    """The feature whose values count as the items' category: the named one, else the first, else none."""
    if named is not None and named not in features:
        raise ConfigError(f"--category-feature {named!r}: no such feature{nearest(named, features)}")
    return named if named is not None else next(iter(features), None)


def build_catalogue(
    ids: pl.Series, counts: np.ndarray, is_own: np.ndarray, features: ItemFeatures, num_unknown_buckets: int
) -> tuple[Catalogue, np.ndarray]:
    """The catalogue, and the item index of each item code, (V,) int32.

    ids: sorted; their place is the code. counts: (V,) events in training. is_own: (V,) bool, whether the item is known
    in training and so has an embedding row of its own; the others take that of their unknown bucket.

    The items known in training come first, the most frequent first, then by id: no later item changes their indices.
    """
    order = np.lexsort((-counts, ~is_own))
    first = 1 + num_unknown_buckets
    item_index = np.empty(len(ids), np.int32)
    item_index[order] = np.arange(first, first + len(ids), dtype=np.int32)
    ordered_ids = ids.to_numpy()[order]
    if ordered_ids.dtype.kind not in "iu":
        ordered_ids = ordered_ids.astype(object)

    def by_index(values: np.ndarray) -> np.ndarray:
        reserved = np.zeros((first, *values.shape[1:]), values.dtype)
        return np.concatenate([reserved, values[order]])

    shared = unknown_rows(num_unknown_buckets)
    names = tuple(features.categories)
    columns = [by_index(features.categories[name]) for name in names]
    catalogue = Catalogue(
        ids=ordered_ids,
        embedding_row=np.concatenate([shared, np.zeros(len(ids), np.int32)]),
        num_unknown_buckets=num_unknown_buckets,
        features=np.column_stack(columns) if columns else np.zeros((0, 0), np.int32),
        feature_names=names,
        feature_values=tuple(features.values[name] for name in names),
        vectors={name: by_index(vectors) for name, vectors in features.vectors.items()},
    )
    own = is_own[order]
    rows = np.where(own, shared.max() + np.cumsum(own), shared[catalogue.unknown_index(ordered_ids)])
    catalogue.embedding_row[first:] = rows
    return catalogue, item_index
