"""Context of a request as the world has it, to the numbers a model reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.catalogue import hash_ids
from vista.checkpoint import ModelSchema
from vista.errors import RequestError, nearest
from vista.schema import NUM_CONTEXT_BUCKETS, ContextColumn
from vista.serving.requests import LARGEST_NUMBER, is_text, shown


@dataclass(frozen=True)
class ContextReader:
    """The context columns of a model."""

    columns: tuple[ContextColumn, ...]

    @classmethod
    def of(cls, schema: ModelSchema) -> ContextReader:
        return cls(schema.context)

    def read(self, given: Any, num_candidates: int) -> np.ndarray | None:
        """``{"price": [9.0, null], "device": "phone"}``, one value for all candidates or one each, to (C, X) float32.

        Raises RequestError for an unknown column, a wrong number of values, or a value of the wrong kind.
        """
        if given is None:
            return None
        if not isinstance(given, dict):
            raise RequestError(f"context is {shown(given)}; give an object of columns")
        known = {column.name: place for place, column in enumerate(self.columns)}
        values = np.full((num_candidates, len(self.columns)), np.nan, np.float32)
        for name, own in given.items():
            if name not in known:
                hint = nearest(name[:80], known) if known else "; this model reads no context"
                raise RequestError(f"context: there is no column {shown(name)}{hint}")
            if isinstance(own, list) and len(own) != num_candidates:
                raise RequestError(
                    f"context, {name}: {len(own)} values for {num_candidates} candidates; give one each, or one"
                )
            column = self.columns[known[name]]
            many = own if isinstance(own, list) else [own]
            values[:, known[name]] = [_value(column, one, place) for place, one in enumerate(many)]
        return values


def _value(column: ContextColumn, value: Any, place: int) -> float:
    """As prepared data holds it: a number, or the bucket of a category; NaN where it is not given."""
    if value is None:
        return math.nan
    if column.kind == "category":
        if isinstance(value, bool):
            value = str(value).lower()  # as `vista prepare` writes it
        if not is_text(value):
            raise RequestError(f"context, {column.name}: value {place} is {shown(value)}; give a string or null")
        return float((hash_ids(np.array([value], object)) % np.uint64(NUM_CONTEXT_BUCKETS))[0])
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_NUMBER:
        raise RequestError(f"context, {column.name}: value {place} is {shown(value)}; give a finite number or null")
    return float(value)
