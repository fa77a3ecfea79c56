"""Quality along an axis: models trained once, evaluated on several test worlds, or with their tokens in several codecs.

    OUT/SET/axis/SETTINGS/                    a test world, prepared in the items of the set
    OUT/SET/ENTRY-SEED-KEY/axis-KEY.json      what a run scored at one point; a point that is there is not scored again

A test world has other users than the one trained on, and its newest requests are scored, so that nearly the whole of a
history lies before them; all of them where the world fixes how long ago each answer lies. Its best possible score is
drawn beside the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vista.benchmark.cells import Cell, Plan, bytes_per_user, cell_folder
from vista.benchmark.entries import Entry
from vista.benchmark.jobs import content_key
from vista.benchmark.sets import CODEC, Axis, BenchmarkSet, world_of
from vista.checkpoint import Run, load_run, write_text
from vista.data.histories import PreparedData
from vista.data.worlds import read_detail
from vista.errors import DataError
from vista.evaluation.evaluate import best_possible, score_impressions
from vista.evaluation.metrics import Estimate, auc, mean_and_standard_error
from vista.evaluation.plots import BEST_STYLE, SLICE_METRICS, finish, panels, style
from vista.evaluation.tables import BEST_POSSIBLE, Table
from vista.evaluation.tables import Cell as TableCell
from vista.models.vista import SequenceModel
from vista.store.record import Record, decode_tokens, encode, unpack

METRICS = ("ne", "auc")
RARE = "rare_auc"  # beside them in worlds that say what a user touched least (docs/worlds.md, ``is_rare``)
TITLES = {"ne": "NE", "auc": "AUC", RARE: "AUC of the rare half"}
LOG_RATIO = 8  # an axis that spans more than this is drawn logarithmically


@dataclass(frozen=True)
class PointScore:
    """One run at one point (its place on the axis): metrics of the first task, and bytes per user with its codec."""

    entry: str
    seed: int
    point: int
    metrics: Mapping[str, float]
    num_bytes: int


@dataclass(frozen=True)
class Sweep:
    """All runs of a set along its axis. best: the best possible metrics at each point, None where they are not known.

    trained_at: the value of the axis that models were trained on, None where it is no single number.
    """

    axis: Axis
    scores: tuple[PointScore, ...]
    best: tuple[Mapping[str, float] | None, ...]
    trained_at: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What tables show."""
        return (*METRICS, RARE) if any(RARE in score.metrics for score in self.scores) else METRICS

    @property
    def entries(self) -> list[str]:
        return list(dict.fromkeys(score.entry for score in self.scores))

    def estimate(self, entry: str, point: int, metric: str) -> Estimate:
        """Mean and standard error over seeds."""
        mine = [s.metrics for s in self.scores if (s.entry, s.point) == (entry, point)]
        return mean_and_standard_error([metrics.get(metric, math.nan) for metrics in mine])

    def x(self, entry: str) -> list[float]:
        """Where an entry's points are drawn: at bytes per user for codecs, at the value, or else at its number."""
        if self.axis.name == CODEC:
            found = {s.point: s.num_bytes for s in self.scores if s.entry == entry}
            return [float(found[i]) for i in sorted(found)]
        return self.places

    @property
    def places(self) -> list[float]:
        values = [number(point[self.axis.name]) for point in self.axis.points()]
        return [float(i) for i in range(len(values))] if None in values else [float(v or 0) for v in values]

    def table(self, metric: str) -> Table:
        """A row per entry, a column per point, and the best possible."""
        rows = [
            (TableCell(entry), *(TableCell(str(self.estimate(entry, i, metric))) for i in range(self.axis.num_points)))
            for entry in self.entries
        ]
        best = [
            TableCell("-" if found is None or metric not in found else f"{found[metric]:.4f}") for found in self.best
        ]
        header = (self.axis.name, *(str(point[self.axis.name]) for point in self.axis.points()))
        return Table(f"{TITLES[metric]} by {self.axis.name}", header, (*rows, (TableCell(BEST_POSSIBLE), *best)))


def check_axes(plan: Plan) -> None:
    """Raise ConfigError, before anything is trained, for a point that its world refuses."""
    for one in plan.sets:
        for point in one.axis.points() if one.axis else ():
            settings = _world_settings(point)
            if settings:
                one.at(settings, Path())


def sweep_axes(plan: Plan, out: Path, cells: dict[str, list[Cell]], say: Callable[[str], None]) -> dict[str, Sweep]:
    """Evaluate the runs of all cells along the axis of their set; sweeps by name of the set."""
    return {
        one.name: _sweep(plan, one, one.axis, out, cells[one.name], say)
        for one in plan.sets
        if one.axis is not None and cells[one.name]
    }


def _sweep(
    plan: Plan, one: BenchmarkSet, axis: Axis, out: Path, cells: Sequence[Cell], say: Callable[[str], None]
) -> Sweep:
    folder = out / one.name
    trained = one.open(folder)
    done = {(cell.entry, cell.seed) for cell in cells}
    scores: list[PointScore] = []
    best = []
    for number_of, point in enumerate(axis.points()):
        settings = _world_settings(point)
        test = one.at(settings, trained.folder) if settings else one
        data = test.open(folder / "axis" / test.name) if settings else trained
        truth = best_possible(data)
        best.append(None if truth is None else truth.metrics[truth.tasks[0]])
        for entry in plan.entries:
            for seed in plan.seeds:
                if (entry.name, seed) in done:
                    place = cell_folder(out, one, trained, entry, entry.config(plan.size, seed, plan.training))
                    log = folder / "axis" / test.name / "log" if settings else folder / "log"
                    codec = point.get(CODEC)
                    scores.append(_score(place, data, log, entry, seed, number_of, codec, plan.device))
        say(_line(one.name, axis, point, scores, number_of))
    return Sweep(axis, tuple(scores), tuple(best), _trained_at(one, axis))


def _line(name: str, axis: Axis, point: Mapping[str, Any], scores: Sequence[PointScore], place: int) -> str:
    mine = [score for score in scores if score.point == place]
    texts = (f"{score.entry} {score.metrics['ne']:.4f}" for score in mine)
    return f"{name}, {axis.name} {point[axis.name]}: NE {', '.join(texts)}"


def _world_settings(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != CODEC}


def _trained_at(one: BenchmarkSet, axis: Axis) -> float | None:
    world = world_of(one)
    return number(getattr(world, axis.name, None)) if world is not None else None


def _score(
    folder: Path, data: PreparedData, log: Path, entry: Entry, seed: int, point: int, codec: str | None, device: str
) -> PointScore:
    """A run's metrics at a point, from its file or measured now. log: the files of a world."""
    path = folder / f"axis-{content_key({'data': data.manifest.checksums, 'codec': codec})}.json"
    if not path.exists():
        run = load_run(folder / "run", device)
        with through_codec(run, codec):
            found = _measure(run, data, log)
        values = {name: None if math.isnan(value) else value for name, value in found.items()}
        num_bytes = bytes_per_user(run, data, codec or "int8")
        write_text(path, json.dumps({"metrics": values, "num_bytes": num_bytes}, allow_nan=False) + "\n")
    try:
        values = json.loads(path.read_text())
        metrics = {name: math.nan if value is None else value for name, value in values["metrics"].items()}
        return PointScore(entry.name, seed, point, {name: metrics[name] for name in METRICS} | metrics,
                          values["num_bytes"])  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a score at a point of an axis ({error!r}); remove it, and it is made again"
        ) from error


def _measure(run: Run, data: PreparedData, log: Path) -> dict[str, float]:
    """Metrics of the first task on the test split; AUC of the rare half: its positives against all negatives."""
    scored, _ = score_impressions(run, data)
    found = scored.metrics(0)
    values = {name: float(found[name]) for name in METRICS}
    has_details = (log / "details.parquet").exists()
    is_rare = read_detail(log, data, "test", "is_rare") if has_details else None
    if is_rare is not None:
        labels = scored.labels[:, 0]
        assert len(is_rare) == len(labels)
        rows = (labels == 0) | (is_rare == 1)
        values[RARE] = auc(labels[rows], scored.probabilities[rows, 0])
    return values


@contextmanager
def through_codec(run: Run, codec: str | None) -> Iterator[None]:
    """The model while its summary tokens go through stored records of this codec; None: nothing changes."""
    with changed_tokens(run, lambda tokens: tokens if codec is None else stored(tokens, codec)):
        yield


@contextmanager
def changed_tokens(run: Run, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model while what its ranker reads as summary tokens (M, K, D) is changed; a model without any stays."""
    summarizer = run.model.summarizer if isinstance(run.model, SequenceModel) else None
    if summarizer is None:
        yield
        return
    names = ("read_memory", "read_full")
    methods = {name: getattr(summarizer, name) for name in names}
    for name, method in methods.items():
        setattr(summarizer, name, lambda *arguments, method=method: change(method(*arguments)))
    try:
        yield
    finally:
        for name in names:
            delattr(summarizer, name)


def stored(tokens: Tensor, codec: str) -> Tensor:
    """Tokens (M, K, D) after a way through the store."""
    version = "codec" + "-" * 11
    blobs = [encode(Record("tokens", version, b"i:0", 0, 0, {"tokens": t}), codec) for t in tokens.cpu().numpy()]
    return torch.from_numpy(decode_tokens([unpack(blob) for blob in blobs])).to(tokens.device) if blobs else tokens


def number(value: Any) -> float | None:
    """A value as a number, a tuple of one included; None for anything else."""
    if isinstance(value, tuple | list):
        value = value[0] if len(value) == 1 else None
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def plot_sweep(sweep: Sweep) -> Figure:
    """NE and AUC along the axis, a line per entry with standard errors over seeds; the best possible dashed."""
    figure, axes = panels(1, len(SLICE_METRICS))
    is_codec = sweep.axis.name == CODEC
    for ax, (metric, title) in zip(axes[0], SLICE_METRICS, strict=True):
        for i, entry in enumerate(sweep.entries):
            found = [sweep.estimate(entry, p, metric) for p in range(sweep.axis.num_points)]
            errors = [0.0 if math.isnan(e.standard_error) else e.standard_error for e in found]
            ax.errorbar(sweep.x(entry), [e.mean for e in found], yerr=errors, capsize=2, markersize=5, linewidth=1.4,
                        **style(entry, i))  # fmt: skip
        places = sorted({x for entry in sweep.entries for x in sweep.x(entry)}) if is_codec else sweep.places
        best = [math.nan if b is None else b[metric] for b in sweep.best]
        if not all(map(math.isnan, best)):
            ax.plot(places, [best[0]] * len(places) if is_codec else best, linewidth=1.4, **BEST_STYLE)
        if min(places) > 0 and max(places) > LOG_RATIO * min(places):
            ax.set_xscale("log")
        if sweep.trained_at is not None and not is_codec:
            ax.axvline(sweep.trained_at, color="#bbbbbb", linestyle=":", linewidth=1, label="trained at")
        ax.set_xlabel("bytes per user" if is_codec else sweep.axis.name.replace("_", " "))
        ax.set_title(title, loc="left")
    return finish(figure, axes)
