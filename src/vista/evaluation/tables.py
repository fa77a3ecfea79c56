"""Evaluations as tables: one plain form, three looks (terminal, Markdown, HTML)."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable

from vista.evaluation.metrics import Estimate, Metrics, mean_and_standard_error, paired_difference
from vista.evaluation.results import Evaluation

BEST_POSSIBLE = "best possible"  # the name of the row that no model can beat
NOTHING = Estimate(math.nan, math.nan, 0)


@dataclass(frozen=True)
class Column:
    """A metric in tables: its key, its title, and how far a value is from perfect (None: neither is better)."""

    key: str
    title: str
    badness: Callable[[float], float] | None = None

    def cell(self, estimate: Estimate) -> str:
        if self.badness is None and not math.isnan(estimate.mean):
            return f"{estimate.mean:,.0f}"
        return str(estimate)


def _less(value: float) -> float:
    return value


def _more(value: float) -> float:
    return -value


def _near_one(value: float) -> float:
    return abs(math.log(value)) if value > 0 else math.inf


COLUMNS = (
    Column("ne", "NE", _less),
    Column("log_loss", "log loss", _less),
    Column("auc", "AUC", _more),
    Column("gauc", "GAUC", _more),
    Column("calibration", "calibration", _near_one),
    Column("shown_hr@1", "HR@1 shown", _more),  # among the candidates of the request
    Column("shown_ndcg@10", "NDCG@10 shown", _more),
    Column("hr@10", "HR@10", _more),  # among all items
    Column("ndcg@10", "NDCG@10", _more),
)
TERMINAL_KEYS = ("ne", "auc", "gauc", "calibration", "hr@10", "ndcg@10")  # what fits the width of a terminal
NUM_IMPRESSIONS = Column("num_impressions", "impressions")


@dataclass(frozen=True)
class Cell:
    text: str
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """title, header, rows of cells; the first ``num_labels`` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_labels: int = 1

    def to_markdown(self) -> str:
        lines = [
            "| " + " | ".join(_escape_markdown(name) for name in self.header) + " |",
            "|" + "|".join("---" if i < self.num_labels else "--:" for i in range(len(self.header))) + "|",
        ]
        for row in self.rows:
            texts = (_escape_markdown(cell.text) for cell in row)
            lines.append(
                "| " + " | ".join(f"**{t}**" if c.is_best else t for t, c in zip(texts, row, strict=True)) + " |"
            )
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        lines = [f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>"]
        for row in self.rows:
            cells = (
                f"<{tag}>{html.escape(cell.text)}</{tag}>"
                for i, cell in enumerate(row)
                for tag in ["th" if i < self.num_labels else "td"]
            )
            marked = (
                text.replace("<td>", '<td class="best">') if cell.is_best else text
                for text, cell in zip(cells, row, strict=True)
            )
            lines.append(f"<tr>{''.join(marked)}</tr>")
        return "\n".join([*lines, "</tbody>\n</table>"])

    def to_rich(self) -> RichTable:
        table = RichTable(title=escape(self.title) or None, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if i < self.num_labels else "right")
        previous = self.rows[0][0].text if self.rows else ""
        for row in self.rows:
            if self.num_labels > 1 and row[0].text != previous:  # a line between tasks
                table.add_section()
            previous = row[0].text
            texts = (f"[bold]{escape(c.text)}[/bold]" if c.is_best else escape(c.text) for c in row)
            table.add_row(*texts, style="dim" if row[self.num_labels - 1].text == BEST_POSSIBLE else None)
        return table


@dataclass(frozen=True)
class Runs:
    """The runs (seeds) of one model."""

    model: str
    evaluations: tuple[Evaluation, ...]

    def values(self, key: str, task: str, part: tuple[str, str] | None = None) -> list[float]:
        """One metric of every run, on everything or on one part (by, bucket); nan where a run lacks it."""
        return [_find(e, task, part).get(key, math.nan) for e in self.evaluations]

    def estimate(self, key: str, task: str, part: tuple[str, str] | None = None) -> Estimate:
        return mean_and_standard_error(self.values(key, task, part))


def _find(evaluation: Evaluation, task: str, part: tuple[str, str] | None) -> Metrics:
    if part is None:
        return evaluation.metrics.get(task, {})
    return evaluation.slice_metrics(task, part[0]).get(part[1], {})


def group_runs(evaluations: Sequence[Evaluation], best_possible: Evaluation | None = None) -> list[Runs]:
    """Runs by model, in the order of their first appearance; the best possible comes last."""
    names = dict.fromkeys(e.model for e in evaluations)
    runs = [Runs(name, tuple(e for e in evaluations if e.model == name)) for name in names]
    return runs if best_possible is None else [*runs, Runs(BEST_POSSIBLE, (best_possible,))]


def all_tasks(runs: Sequence[Runs]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for r in runs for e in r.evaluations for task in e.tasks))


def buckets_of(runs: Sequence[Runs], task: str, by: str) -> tuple[str, ...]:
    """The buckets that any run has, in their order (runs on the same data have the same)."""
    return tuple(dict.fromkeys(b for r in runs for e in r.evaluations for b in e.slice_metrics(task, by)))


def overview_table(runs: Sequence[Runs], keys: Sequence[str] | None = None, title: str = "") -> Table:
    """One row per task and model: every metric (of ``keys``) that any run has, mean and standard error over runs."""
    tasks = all_tasks(runs)
    chosen = [c for c in (*COLUMNS, NUM_IMPRESSIONS) if keys is None or c.key in keys]
    columns = [c for c in chosen if any(_is_known(r.estimate(c.key, t)) for r in runs for t in tasks)]
    rows = []
    for task in tasks:
        cells_by_column = [_cells(c, runs, [r.estimate(c.key, task) for r in runs]) for c in columns]
        for i, r in enumerate(runs):
            rows.append((Cell(task), Cell(r.model), Cell(str(len(r.evaluations))), *(c[i] for c in cells_by_column)))
    return Table(title, ("task", "model", "runs", *(c.title for c in columns)), tuple(rows), num_labels=2)


def slice_table(runs: Sequence[Runs], task: str, by: str, key: str) -> Table:
    """One metric on every part: a row per bucket, a column per model."""
    column = next(c for c in COLUMNS if c.key == key)
    rows = []
    for bucket in buckets_of(runs, task, by):
        cells = _cells(column, runs, [r.estimate(key, task, (by, bucket)) for r in runs])
        sizes = [r.estimate("num_impressions", task, (by, bucket)) for r in runs]
        size = next((s for s in sizes if _is_known(s)), NOTHING)
        rows.append((Cell(bucket), Cell(NUM_IMPRESSIONS.cell(size)), *cells))
    return Table(f"{column.title} by {by}, {task}", (by, "impressions", *(r.model for r in runs)), tuple(rows))


def difference_table(runs: Sequence[Runs]) -> Table | None:
    """NE and AUC of every model less those of the first, run by run; None where no model shares two runs with it."""
    first, rows = runs[0], []
    for task in all_tasks(runs):
        for other in runs[1:]:
            mine, theirs = _paired(other, first)
            if len(mine.evaluations) < 2:
                continue
            cells = [Cell(task), Cell(other.model), Cell(str(len(mine.evaluations)))]
            for key in ("ne", "auc"):
                difference = paired_difference(mine.values(key, task), theirs.values(key, task))
                cells += [Cell(str(difference)), Cell(f"{difference.in_standard_errors:+.1f}")]
            rows.append(tuple(cells))
    header = ("task", "model", "pairs", "NE difference", "in standard errors", "AUC difference", "in standard errors")
    return Table(f"Difference to {first.model}, paired by seed", header, tuple(rows), num_labels=2) if rows else None


def render_table(evaluations: Sequence[Evaluation], best_possible: Evaluation | None = None) -> RichTable:
    """The table for a terminal: a row per task and model, mean and standard error where a model has several runs."""
    return overview_table(group_runs(evaluations, best_possible), TERMINAL_KEYS).to_rich()


def _paired(one: Runs, other: Runs) -> tuple[Runs, Runs]:
    """The runs of both models that share a ``seed`` in their protocol, in the same order."""
    by_seed = [{e.protocol["seed"]: e for e in runs.evaluations if "seed" in e.protocol} for runs in (one, other)]
    common = [seed for seed in by_seed[0] if seed in by_seed[1]]
    first, second = (tuple(evaluations[seed] for seed in common) for evaluations in by_seed)
    return Runs(one.model, first), Runs(other.model, second)


def _cells(column: Column, runs: Sequence[Runs], estimates: Sequence[Estimate]) -> list[Cell]:
    """One cell per model; the best of at least two models is marked, the best possible does not compete."""
    badness = column.badness
    texts = [column.cell(e) for e in estimates]
    if badness is None:
        return [Cell(text) for text in texts]
    competing = [
        badness(e.mean) for r, e in zip(runs, estimates, strict=True) if r.model != BEST_POSSIBLE and _is_known(e)
    ]
    best = min(competing) if len(competing) > 1 else -math.inf
    return [
        Cell(text, _is_known(e) and r.model != BEST_POSSIBLE and badness(e.mean) == best)
        for text, r, e in zip(texts, runs, estimates, strict=True)
    ]


def _is_known(estimate: Estimate) -> bool:
    return not math.isnan(estimate.mean)


def _escape_markdown(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "<"):
        text = text.replace(mark, "\\" + mark)
    return text
