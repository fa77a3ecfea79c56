"""The plots of a report. Each function draws one figure and returns it; nothing here touches global state of pyplot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vista.evaluation.metrics import Estimate
from vista.evaluation.tables import BEST_POSSIBLE, Runs, all_tasks, buckets_of

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe and Ito: colour-blind safe
MARKERS = "osD^vPX"
LINESTYLES = ("-", ":", "--")  # with colour and marker of an earlier model, the line and an open marker tell them apart
BEST_STYLE: dict[str, Any] = {"color": "#777777", "linestyle": "--", "marker": "", "label": BEST_POSSIBLE}
PANEL_INCHES = (5.8, 3.5)
SQUARE_INCHES = (4.4, 4.0)
LEAST_PROBABILITY_SHOWN = 1e-5
CALIBRATION_POINTS = 12  # of all runs of a model together: more would show noise
DPI = 120
LETTER_IN, HANDLE_IN = 0.075, 0.6  # of a legend at nine points: a letter, and a marker with the space around it
MOST_LEGEND_COLUMNS = 6
SLICE_METRICS = (("ne", "NE (lower is better)"), ("auc", "AUC (higher is better)"))
ORDERED_SLICES = ("history length", "distance", "positive distance")  # their buckets lie on a scale: joined by lines
SLICE_AXES = {
    "history length": "events known before the request",
    "distance": "events since the user last met the item shown",
    "positive distance": "events since the user last met the positive (with all its negatives)",
    "source": "all positives against the negatives of one source",
}


def plot_slices(runs: Sequence[Runs], by: str) -> Figure:
    """NE and AUC on every part, a row of panels per task; error bars are standard errors over runs."""
    tasks = all_tasks(runs)
    figure, axes = panels(len(tasks), len(SLICE_METRICS))
    for row, task in enumerate(tasks):
        buckets = buckets_of(runs, task, by)
        for column, (key, title) in enumerate(SLICE_METRICS):
            ax = axes[row][column]
            for i, r in enumerate(runs):
                estimates = [r.estimate(key, task, (by, bucket)) for bucket in buckets]
                _draw_buckets(ax, estimates, style(r.model, i), by in ORDERED_SLICES, _dodge(runs, i))
            _label_buckets(ax, runs, task, by, buckets)
            ax.set_title(f"{task}: {title}", loc="left")
            if key == "ne" and ax.get_ylim()[0] < 1 < ax.get_ylim()[1]:
                ax.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)  # what the base rate alone gives
            ax.set_xlabel(SLICE_AXES[by])
    return finish(figure, axes)


def plot_calibration(runs: Sequence[Runs]) -> Figure:
    """What was predicted against what happened, per task, on logarithmic axes; all runs of a model are put together.

    A bin without a positive has no place on a logarithmic axis: it lies on the lower edge, as all that is below it.
    """
    tasks = all_tasks(runs)
    figure, axes = panels(1, len(tasks), SQUARE_INCHES)
    for ax, task in zip(axes[0], tasks, strict=True):
        curves = [_pooled_bins(r, task) for r in runs]
        values = np.concatenate([np.zeros(0), *(curve.ravel() for curve in curves)])
        lowest = max(values[values > 0].min(initial=0.1) * 0.8, LEAST_PROBABILITY_SHOWN)
        ends = (lowest, min(values.max(initial=lowest) * 1.25, 1.0))
        ax.plot(ends, ends, color="#bbbbbb", linewidth=0.8, zorder=0)
        for i, (r, curve) in enumerate(zip(runs, curves, strict=True)):
            ax.plot(*np.maximum(curve, lowest), markersize=4, clip_on=False, **style(r.model, i))
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, box_aspect=1)
        _label_decades(ax, ends[1] / ends[0])
        ax.set(xlabel="mean probability", ylabel="share of positives")
        ax.set_title(f"{task}: calibration", loc="left")
    return finish(figure, axes)


def _label_decades(ax: Axes, ratio: float) -> None:
    """Plain numbers on both axes, few enough not to overlap: matplotlib labels every minor tick of a narrow range."""
    steps = (1.0,) if ratio > 300 else (1.0, 2.0, 5.0) if ratio > 8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _pooled_bins(runs: Runs, task: str) -> np.ndarray:
    """Mean probability and mean label of CALIBRATION_POINTS groups of neighbouring bins, (2, points)."""
    bins = [b for e in runs.evaluations for b in e.calibration.get(task, ())]
    bins.sort(key=lambda b: b.mean_probability)
    counts = np.array([b.count for b in bins], float)
    means = np.array([(b.mean_probability, b.mean_label) for b in bins]).reshape(len(bins), 2).T
    group = ((np.cumsum(counts) - counts / 2) / max(counts.sum(), 1) * CALIBRATION_POINTS).astype(int)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    if not len(starts):
        return np.zeros((2, 0))
    return np.add.reduceat(means * counts, starts, axis=1) / np.add.reduceat(counts, starts)


def plot_learning_curve(runs: Sequence[Runs]) -> Figure | None:
    """Validation NE and training loss by step, a line per run; None where no run brought its curve."""
    names = (("validation_ne", "validation NE"), ("loss", "training loss"))
    present = [(key, title) for key, title in names if any(key in record for r in _curves(runs) for record in r)]
    if not present:
        return None
    figure, axes = panels(1, len(present))
    for ax, (key, title) in zip(axes[0], present, strict=True):
        for i, r in enumerate(runs):
            for number, evaluation in enumerate(r.evaluations):
                points = [(p["step"], p[key]) for p in evaluation.learning_curve if key in p]
                if points:
                    look = style(r.model, i) | {"marker": "" if len(points) > 1 else "o"}
                    look |= {"label": "_again"} if number else {}  # one entry in the legend for all runs
                    ax.plot(*zip(*points, strict=True), linewidth=1.2, alpha=0.8, **look)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.set_title(title, loc="left")
    return finish(figure, axes)


def save_png(figure: Figure, path: Path) -> None:
    """Write one figure; the same values give the same bytes."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def _curves(runs: Sequence[Runs]) -> list[tuple[dict[str, float], ...]]:
    return [e.learning_curve for r in runs for e in r.evaluations]


def panels(rows: int, columns: int, inches: tuple[float, float] = PANEL_INCHES) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def style(model: str, i: int) -> dict[str, Any]:
    if model == BEST_POSSIBLE:
        return dict(BEST_STYLE)
    round_trip, place = divmod(i, len(COLOURS))
    face = {"markerfacecolor": "white"} if round_trip else {}
    line = LINESTYLES[round_trip % len(LINESTYLES)]
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": line, "label": model, **face}


def _dodge(runs: Sequence[Runs], i: int) -> float:
    """A shift to the side, so that the error bars of several models do not hide one another."""
    num_models = sum(r.model != BEST_POSSIBLE for r in runs)
    return 0.0 if runs[i].model == BEST_POSSIBLE else (i - (num_models - 1) / 2) * min(0.08, 0.4 / num_models)


def _draw_buckets(
    ax: Axes, estimates: Sequence[Estimate], style: dict[str, Any], is_joined: bool, shift: float
) -> None:
    x = np.arange(len(estimates)) + shift
    y = np.array([e.mean for e in estimates])
    errors = np.array([0.0 if math.isnan(e.standard_error) else e.standard_error for e in estimates])
    drawn = {"markersize": 5.0} | style
    if not is_joined:
        drawn |= {"linestyle": ""} if style["marker"] else {"linestyle": "", "marker": "_", "markersize": 28.0}
    ax.errorbar(x, y, yerr=errors if errors.any() else None, capsize=2, linewidth=1.4, **drawn)


def _label_buckets(ax: Axes, runs: Sequence[Runs], task: str, by: str, buckets: Sequence[str]) -> None:
    labels = []
    for bucket in buckets:
        sizes = [r.estimate("num_impressions", task, (by, bucket)).mean for r in runs]
        size = next((s for s in sizes if not math.isnan(s)), 0.0)
        labels.append(f"{bucket.replace('-', chr(0x2013), 1)}\n{short(size)}")
    ax.set_xticks(range(len(buckets)), labels, fontsize=7.5)
    ax.set_xlim(-0.5, max(len(buckets) - 0.5, 0.5))


def short(count: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"n={count / size:.3g}{unit}"
    return f"n={count:.0f}"


def finish(figure: Figure, axes: list[list[Axes]]) -> Figure:
    """One legend above all panels, light grids, no box."""
    for ax in (ax for row in axes for ax in row):
        ax.grid(axis="both", color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.title.set_fontsize(10)
        ax.xaxis.label.set_fontsize(8.5)
        ax.yaxis.label.set_fontsize(8.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if labels:
        widest_in = LETTER_IN * max(map(len, labels)) + HANDLE_IN
        columns = max(1, min(len(labels), MOST_LEGEND_COLUMNS, int(figure.get_figwidth() / widest_in)))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure
