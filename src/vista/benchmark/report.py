"""The report of a benchmark: one page over all sets, as HTML and Markdown, with plots, beside a full report per set.

OUT/index.html, benchmark.md     per set: verdict, table, differences, where length stops paying, cost
OUT/SET/report/                  the report of `vista evaluate` over all of the set's runs
"""

from __future__ import annotations

import html
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vista.benchmark.cells import DISTRIBUTION, Cell, Plan
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
PLOT = "cost.png"
NOTE = (
    "NE: log loss relative to that of the base rate; lower is better. ±: standard error over seeds. Bytes per user: "
    "what must be at hand to rank for a user with a long history. Seconds of training count as ratios only."
)


@dataclass(frozen=True)
class Part:
    """All that the report says of one set."""

    one: BenchmarkSet
    data: PreparedData
    cells: Sequence[Cell]
    runs: list[Runs]
    verdict: Verdict | None

    @classmethod
    def of(cls, one: BenchmarkSet, data: PreparedData, cells: Sequence[Cell]) -> Part:
        runs = group_runs([c.evaluation for c in cells], best_possible(data))
        return cls(one, data, cells, runs, judge(one.name, cells))

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

    def tables(self) -> list[Table]:
        task = self.runs[0].evaluations[0].tasks[0]
        differences = difference_table(self.runs)
        sliced = [slice_table(self.runs, task, by, "auc") for by in SLICED_BY]
        return [
            overview_table(self.runs, OVERVIEW_KEYS, "All test impressions"),
            *([differences] if differences is not None else []),
            *(table for table in sliced if len(table.rows) > 1),
            cost_table(self.cells),
        ]


def write_benchmark(plan: Plan, cells: dict[str, list[Cell]], out: Path, command: Sequence[str]) -> Path:
    """Write the page and the reports of the sets that have a cell; the path of index.html."""
    parts = [Part.of(one, one.open(out / one.name), cells[one.name]) for one in plan.sets if cells[one.name]]
    for part in parts:
        folder = out / part.one.name
        evaluations = [c.evaluation for c in part.cells]
        write_report(evaluations, folder / "report", best_possible(part.data), f"Lifelong benchmark: {part.one.name}")
        save_png(plot_cost(part.cells), folder / PLOT)
    title = "Lifelong benchmark"
    facts = _facts(plan, cells, command)
    write_text(out / "benchmark.md", _markdown(title, facts, parts))
    write_text(out / "index.html", _html(title, facts, parts, out))
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
        f"vista {version(DISTRIBUTION)}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s).",
        NOTE,
    ]


def _checksum(part: Part) -> str:
    item = part.data.manifest.checksums["events/item.npy"]
    return f"SHA-256 of events/item.npy: {item[:16]}"


def _markdown(title: str, facts: Sequence[str], parts: Sequence[Part]) -> str:
    lines = [f"# {title}", "", *(f"{fact}\n" for fact in facts)]
    lines += [f"- {part.verdict.sentence()}" for part in parts if part.verdict]
    for part in parts:
        lines += ["", f"## {part.one.name}", "", part.about, ""]
        lines += [f"{part.lengths}\n"] if part.lengths else []
        for table in part.tables():
            lines += [f"### {table.title}", "", table.to_markdown()]
        lines += [f"![NE against cost]({part.one.name}/{PLOT})", ""]
        lines += [f"![By distance]({part.one.name}/report/by_positive_distance.png)", "", _checksum(part)]
    return "\n".join(lines) + "\n"


def _html(title: str, facts: Sequence[str], parts: Sequence[Part], out: Path) -> str:
    body = [f"<h1>{title}</h1>", *(f'<p class="note">{html.escape(fact)}</p>' for fact in facts), "<ul>"]
    body += [f"<li>{html.escape(part.verdict.sentence())}</li>" for part in parts if part.verdict]
    body += ["</ul>"]
    for part in parts:
        name, folder = html.escape(part.one.name), out / part.one.name
        body += [f"<h2>{name}</h2>", f"<p>{html.escape(part.about)}</p>"]
        body += [f"<p>{html.escape(part.lengths)}</p>"] if part.lengths else []
        for table in part.tables():
            body += [f"<h3>{html.escape(table.title)}</h3>", wide(table)]
        body += [image(folder / PLOT, "NE against cost")]
        body += [image(folder / "report" / "by_positive_distance.png", "By distance")]
        body += [f'<p class="note"><a href="{name}/report/index.html">all slices</a>; {_checksum(part)}</p>']
    return page(title, body)
