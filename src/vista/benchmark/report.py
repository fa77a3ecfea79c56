"""The report of a benchmark: one page over all sets, as HTML and Markdown, with plots, beside a full report per set.

OUT/index.html, benchmark.md     per set: verdict, table, differences, where length stops paying, what others published,
                                 quality along an axis, against history length, bytes per user and training cost
OUT/SET/report/                  the report of `vista evaluate` over all of the set's runs
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vista.benchmark.axes import Sweep, plot_sweep
from vista.benchmark.cells import Cell, Plan
from vista.benchmark.machine import machine, versions
from vista.benchmark.sets import BenchmarkSet
from vista.benchmark.verdict import Verdict, judge, rewarded_length, scores
from vista.checkpoint import write_text
from vista.data.histories import PreparedData
from vista.evaluation.evaluate import best_possible
from vista.evaluation.metrics import Estimate, mean_and_standard_error
from vista.evaluation.plots import finish, panels, save_png, style
from vista.evaluation.report import image, page, wide, write_report
from vista.evaluation.tables import Cell as TableCell
from vista.evaluation.tables import Runs, Table, difference_table, group_runs, overview_table, slice_table

OVERVIEW_KEYS = ("ne", "auc", "gauc", "calibration")
SLICED_BY = ("positive distance", "source", "history length")
COST_PLOT, AXIS_PLOT = "cost.png", "axis.png"
PLOTS = {  # below the folder of the set; those that are there are shown
    AXIS_PLOT: "Quality along the axis",
    COST_PLOT: "NE against bytes per user and against training time",
    "report/by_history_length.png": "By history length",
    "report/by_positive_distance.png": "By how far back the positive was last met",
    "report/learning_curve.png": "Learning curves",
}
NOTE = (
    "NE: log loss relative to that of the base rate; lower is better. ±: standard error over seeds. Bytes per user: "
    "what must be at hand to rank for a user with a long history. Seconds of training count as ratios only."
)


@dataclass(frozen=True)
class Part:
    """All that the report says of one set. folder: of the set, below the page."""

    one: BenchmarkSet
    data: PreparedData
    cells: Sequence[Cell]
    runs: list[Runs]
    verdict: Verdict
    sweep: Sweep | None
    folder: Path

    @classmethod
    def of(
        cls, one: BenchmarkSet, folder: Path, cells: Sequence[Cell], training: Mapping[str, Any], sweep: Sweep | None
    ) -> Part:
        """training: settings that all entries were trained with."""
        data = one.open(folder)
        runs = group_runs([c.evaluation for c in cells], best_possible(data))
        return cls(one, data, cells, runs, judge(one.name, cells, training), sweep, folder)

    def write(self) -> None:
        """The full report of the set, and the plots that the page shows."""
        evaluations = [cell.evaluation for cell in self.cells]
        title = f"Lifelong benchmark: {self.one.name}"
        write_report(evaluations, self.folder / "report", best_possible(self.data), title)
        save_png(plot_cost(self.cells), self.folder / COST_PLOT)
        (self.folder / AXIS_PLOT).unlink(missing_ok=True)
        if self.sweep is not None:
            save_png(plot_sweep(self.sweep), self.folder / AXIS_PLOT)

    @property
    def about(self) -> str:
        have = self.data.manifest.statistics
        return (
            f"{self.one.about} {have['num_events']:,} events of {have['num_users']:,} users (mean "
            f"{have['mean_history']:,.0f}, longest {have['longest_history']:,}); test: "
            f"{have['num_requests']['test']:,} requests, {have['num_impressions']['test']:,} impressions."
        )

    @property
    def lengths(self) -> str | None:
        """Where counts stop gaining from more history."""
        last = rewarded_length(self.cells)
        if last is None:
            return None
        if last == 0:
            return "Counts gain from every event: even the longest cut is beaten by the whole history."
        return f"Counts gain from history up to the last {last:,} events, and not beyond."

    @property
    def plots(self) -> list[tuple[str, str]]:
        """Name below the folder of the set, and what it shows."""
        return [(name, text) for name, text in PLOTS.items() if (self.folder / name).exists()]

    @property
    def notes(self) -> list[str]:
        """What must be known beside the tables: whom the published numbers hold for, and what was measured on."""
        published, notes = self.one.published, []
        if published is not None:
            notes.append(
                f"Published: {published.source}. Protocol there: {published.protocol} Ours: {published.difference}"
            )
        if self.sweep is not None:
            fixed = {name: values for name, values in self.sweep.axis.settings.items() if len(values) == 1}
            also = (
                f" Also there: {', '.join(f'{name} {values[0]}' for name, values in fixed.items())}." if fixed else ""
            )
            notes.append(
                f"Along {self.sweep.axis.name}: models trained once, other users, nothing trained again.{also}"
            )
        checksums = json.dumps(self.data.manifest.checksums, sort_keys=True)
        made = json.dumps(self.one.described, sort_keys=True, default=str)
        digest = hashlib.sha256(checksums.encode()).hexdigest()
        return [*notes, f"SHA-256 over the checksums of all prepared files: {digest}", f"Made from: {made}"]

    def tables(self) -> list[Table]:
        task = self.runs[0].evaluations[0].tasks[0]
        differences = difference_table(self.runs)
        published = self.one.published.table(self.cells) if self.one.published is not None else None
        sliced = [slice_table(self.runs, task, by, "auc") for by in SLICED_BY]
        return [
            overview_table(self.runs, OVERVIEW_KEYS, "All test impressions"),
            *([differences] if differences is not None else []),
            *(table for table in sliced if len(table.rows) > 1),
            *([published] if published is not None else []),
            *([self.sweep.table(metric) for metric in self.sweep.metrics] if self.sweep is not None else []),
            cost_table(self.cells),
        ]


def write_benchmark(
    plan: Plan,
    cells: dict[str, list[Cell]],
    out: Path,
    command: Sequence[str],
    sweeps: Mapping[str, Sweep] | None = None,
) -> Path:
    """Write the page and the reports of the sets that have a cell; the path of index.html."""
    found = [one for one in plan.sets if cells[one.name]]
    parts = [
        Part.of(one, out / one.name, cells[one.name], plan.training, (sweeps or {}).get(one.name)) for one in found
    ]
    for part in parts:
        part.write()
    title = "Lifelong benchmark"
    facts = _facts(plan, cells, command)
    write_text(out / "benchmark.md", _markdown(title, facts, parts))
    write_text(out / "index.html", _html(title, facts, parts))
    return out / "index.html"


def cost_table(cells: Sequence[Cell]) -> Table:
    """What each entry costs: bytes per user, weights, and training."""
    rows = []
    for entry in dict.fromkeys(c.entry for c in cells):
        mine = [c for c in cells if c.entry == entry]
        seconds = mean_and_standard_error([c.seconds for c in mine])
        numbers = (
            f"{mine[0].bytes_per_user:,}",
            f"{mine[0].num_weights:,}",
            f"{mine[0].steps:,}",
            f"{seconds.mean:,.0f}",
        )
        rows.append((TableCell(entry), *map(TableCell, numbers)))
    header = ("model", "bytes per user", "weights", "steps (first seed)", "seconds of training")
    return Table("Cost", header, tuple(rows))


def plot_cost(cells: Sequence[Cell]) -> Figure:
    """NE against bytes per user and against seconds of training, a point per entry."""
    figure, axes = panels(1, 2)
    entries = list(dict.fromkeys(c.entry for c in cells))
    for i, entry in enumerate(entries):
        mine = [c for c in cells if c.entry == entry]
        ne = mean_and_standard_error(list(scores(cells, entry).values()))
        look = style(entry, i) | {"linestyle": ""}
        for ax, x in zip(axes[0], (mine[0].bytes_per_user, sum(c.seconds for c in mine) / len(mine)), strict=True):
            ax.errorbar([max(x, 1)], [ne.mean], yerr=[_error(ne)], capsize=2, markersize=6, **look)
    for ax, label in zip(axes[0], ("bytes per user", "seconds of training"), strict=True):
        ax.set(xscale="log", xlabel=label, ylabel="NE (lower is better)")
    return finish(figure, axes)


def _error(estimate: Estimate) -> float:
    return 0.0 if math.isnan(estimate.standard_error) else estimate.standard_error


def _facts(plan: Plan, cells: dict[str, list[Cell]], command: Sequence[str]) -> list[str]:
    done = sum(map(len, cells.values()))
    budget = "" if done == plan.num_cells else f" **Partial**: {done} of {plan.num_cells} runs were within the budget."
    settings = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in plan.training.items())
    return [
        f"Command: `{shlex.join(command)}`",
        f"Size {plan.size}{f'; {settings}' if settings else ''}; seeds {', '.join(map(str, plan.seeds))}.{budget}",
        f"Machine: {machine()}; models on {plan.device}.",
        f"Versions: {versions()}.",
        NOTE,
    ]


def _markdown(title: str, facts: Sequence[str], parts: Sequence[Part]) -> str:
    lines = [f"# {title}", "", *(f"{fact}\n" for fact in facts)]
    lines += [f"- {part.verdict.sentence()}" for part in parts]
    for part in parts:
        lines += ["", f"## {part.one.name}", "", part.about, ""]
        lines += [f"{part.lengths}\n"] if part.lengths else []
        for table in part.tables():
            lines += [f"### {table.title}", "", table.to_markdown()]
        for name, text in part.plots:
            lines += [f"![{text}]({part.one.name}/{name})", ""]
        lines += [f"{note}\n" for note in part.notes]
    return "\n".join(lines) + "\n"


def _html(title: str, facts: Sequence[str], parts: Sequence[Part]) -> str:
    body = [f"<h1>{title}</h1>", *(f'<p class="note">{html.escape(fact)}</p>' for fact in facts), "<ul>"]
    body += [f"<li>{html.escape(part.verdict.sentence())}</li>" for part in parts]
    body += ["</ul>"]
    for part in parts:
        name = html.escape(part.one.name)
        body += [f"<h2>{name}</h2>", f"<p>{html.escape(part.about)}</p>"]
        body += [f"<p>{html.escape(part.lengths)}</p>"] if part.lengths else []
        for table in part.tables():
            body += [f"<h3>{html.escape(table.title)}</h3>", wide(table)]
        for file, text in part.plots:
            body += [f"<h3>{html.escape(text)}</h3>", image(part.folder / file, text)]
        body += [f'<p class="note">{html.escape(note)}</p>' for note in part.notes]
        body += [f'<p class="note"><a href="{name}/report/index.html">all slices</a></p>']
    return page(title, body)
