"""One model's evaluation: plain values that survive a trip through JSON. No plots, no tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vista.errors import DataError
from vista.evaluation.metrics import CalibrationBin, Metrics, calibration_curve
from vista.evaluation.slices import ScoredImpressions, Slice, all_slices


@dataclass(frozen=True)
class Evaluation:
    """What is known about one run of one model on one split.

    model: the name in tables and plots; runs of one model with different seeds share it.
    metrics, calibration: by task. protocol: how it was measured (split, number of requests, seed, data, ...).
    learning_curve: one record per validation, as in a run's log.jsonl: ``step`` and named values.
    """

    model: str
    metrics: dict[str, Metrics]
    slices: tuple[Slice, ...] = ()
    calibration: dict[str, tuple[CalibrationBin, ...]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    learning_curve: tuple[dict[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        model: str,
        scored: ScoredImpressions,
        protocol: Mapping[str, Any] | None = None,
        learning_curve: tuple[dict[str, float], ...] = (),
    ) -> Evaluation:
        """Measure everything. Raises DataError when a probability is not one."""
        tasks = list(enumerate(scored.tasks))
        return cls(
            model,
            {name: scored.metrics(task) for task, name in tasks},
            all_slices(scored),
            {name: calibration_curve(scored.labels[:, t], scored.probabilities[:, t]) for t, name in tasks},
            dict(protocol or {}),
            learning_curve,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def slice_metrics(self, task: str, by: str) -> dict[str, Metrics]:
        """Bucket -> metrics of one way to part the impressions, in the order of the buckets."""
        return {part.bucket: part.metrics for part in self.slices if part.task == task and part.by == by}

    def to_json(self) -> dict[str, Any]:
        """Plain values; what could not be measured (nan) is null."""
        values: dict[str, Any] = _replace_nan(asdict(self))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The reverse of ``to_json``. Raises DataError when it is not an evaluation."""
        try:
            return cls(
                values["model"],
                {task: _metrics(metrics) for task, metrics in values["metrics"].items()},
                tuple(Slice(**{**part, "metrics": _metrics(part["metrics"])}) for part in values["slices"]),
                {task: tuple(CalibrationBin(**b) for b in bins) for task, bins in values["calibration"].items()},
                dict(values["protocol"]),
                tuple(_metrics(record) for record in values["learning_curve"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not an evaluation as `vista evaluate --json` prints it: {error!r}") from error

    def dumps(self) -> str:
        """One JSON text."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False)


def _metrics(values: Mapping[str, float | None]) -> Metrics:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _replace_nan(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _replace_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
