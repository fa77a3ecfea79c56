"""What other people published on a set, beside ours, with the difference of protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vista.errors import ConfigError
from vista.evaluation.metrics import mean_and_standard_error
from vista.evaluation.tables import COLUMNS, Table
from vista.evaluation.tables import Cell as TableCell

if TYPE_CHECKING:
    from vista.benchmark.cells import Cell

METRICS = {column.key: column.title for column in COLUMNS}
OWN_KEYS = ("model", "ours")  # of a row, beside its metrics


@dataclass(frozen=True)
class PublishedRow:
    """model: as its authors call it. ours: the entry of this benchmark that is meant to be it, or empty."""

    model: str
    metrics: Mapping[str, float]
    ours: str = ""


@dataclass(frozen=True)
class Published:
    """source: where the numbers stand. protocol: how they were measured. difference: what we do otherwise."""

    source: str
    protocol: str
    difference: str
    rows: tuple[PublishedRow, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any], place: str) -> Published:
        """From a table of a config file. Raises ConfigError for what is missing, unknown or no number."""
        texts = {}
        for name in ("source", "protocol", "difference"):
            texts[name] = values.get(name)
            if not isinstance(texts[name], str):
                raise ConfigError(f"{place}: [published] needs {name}, a text")
        unknown = values.keys() - {*texts, "rows"}
        if unknown:
            raise ConfigError(f"{place}: [published] has no {sorted(unknown)[0]!r}; there is: {', '.join(texts)}, rows")
        return cls(**texts, rows=tuple(_row(row, place) for row in values.get("rows", ())))  # type: ignore[arg-type]

    def table(self, cells: Sequence[Cell]) -> Table | None:
        """A row per published model, beside the mean of ours; None without numbers."""
        keys = [key for key in METRICS if any(key in row.metrics for row in self.rows)]
        if not keys:
            return None
        rows = []
        for row in self.rows:
            mine = [cell for cell in cells if cell.entry == row.ours]
            texts = [text for key in keys for text in (_plain(row.metrics.get(key)), _mean(mine, key))]
            rows.append((TableCell(row.model), TableCell(row.ours or "-"), *map(TableCell, texts)))
        header = [f"{METRICS[key]}, {whose}" for key in keys for whose in ("published", "ours")]
        return Table("Published, and ours", ("published model", "our entry", *header), tuple(rows), num_labels=2)


def _row(values: Mapping[str, Any], place: str) -> PublishedRow:
    metrics = {name: value for name, value in values.items() if name not in OWN_KEYS}
    for name, value in metrics.items():
        if name not in METRICS or not isinstance(value, int | float):
            raise ConfigError(f"{place}: [published] row {name} = {value!r}: metrics are {', '.join(METRICS)}")
    return PublishedRow(str(values.get("model", "")), metrics, str(values.get("ours", "")))


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _mean(cells: Sequence[Cell], key: str) -> str:
    values = [c.evaluation.metrics[c.evaluation.tasks[0]].get(key, math.nan) for c in cells]
    found = [value for value in values if not math.isnan(value)]
    return str(mean_and_standard_error(found)) if found else "-"
