"""A report: a folder with one page for a browser, the same as Markdown, the plots, and all numbers as JSON."""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.errors import DataError, StaleOutput
from vista.evaluation.results import Evaluation
from vista.evaluation.slices import SLICES
from vista.evaluation.tables import (
    Cell,
    Runs,
    Table,
    all_tasks,
    difference_table,
    group_runs,
    overview_table,
    render_table,
    slice_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "read_report", "render_table", "write_report"]

NUMBERS = "report.json"
SLICE_KEYS = ("ne", "auc")
ABOUT_SLICES = {
    "history length": "By the number of events known before the request.",
    "distance": "By how far back the user last met the item shown.",
    "positive distance": "By how far back the user last met the positive; all negatives of its request are kept.",
    "source": "All positives against the negatives of one source.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { font-weight: 600; } tbody th { text-align: left; font-weight: 400; } thead th:first-child { text-align: left; }
td.best { font-weight: 700; } img { max-width: 100%; } .wide { overflow-x: auto; } .tables { display: flex;
flex-wrap: wrap; gap: 0 2.5rem; } p.note { color: #666; max-width: 60rem; }
"""
NOTE = (
    "NE: log loss relative to that of the base rate, lower is better. AUC, GAUC (per user), HR and NDCG: higher is "
    "better. Calibration: mean prediction over mean label, 1 is right. Bold: best of the models. ±: standard error "
    "over runs. The NE of two slices do not compare, that of two models on one slice does."
)


def write_report(
    evaluations: Sequence[Evaluation],
    out: Path | str,
    best_possible: Evaluation | None = None,
    title: str = "VISTA evaluation",
) -> Path:
    """Write ``out``: index.html (one file, nothing from elsewhere), report.md, report.json and PNG plots.

    Evaluations with the same ``model`` are runs of it: tables and plots give their mean and standard error. The order
    of the models is that of the evaluations; the first is what the others are compared with.

    Returns the path of index.html. An older report in ``out`` is replaced, in one step and only when the new one is
    complete. Raises StaleOutput when ``out`` holds anything else, DataError when there is nothing to report.
    """
    out = Path(out)
    if not evaluations:
        raise DataError("nothing to report: give at least one evaluation")
    _refuse_other_folder(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    runs = group_runs(evaluations, best_possible)
    _write_plots(runs, partial)
    (partial / "report.md").write_text(_markdown(runs, title, partial), encoding="utf-8")
    (partial / "index.html").write_text(_html(runs, title, partial), encoding="utf-8")
    numbers = {
        "title": title,
        "evaluations": [e.to_json() for e in evaluations],
        "best_possible": best_possible.to_json() if best_possible is not None else None,
    }
    (partial / NUMBERS).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out / "index.html"


def read_report(folder: Path | str) -> tuple[list[Evaluation], Evaluation | None]:
    """The evaluations and the best possible of a report. Raises DataError when there is none."""
    path = Path(folder) / NUMBERS
    try:
        numbers: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        best = numbers["best_possible"]
        evaluations = [Evaluation.from_json(values) for values in numbers["evaluations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a report ({error}); write it again with: vista evaluate") from error
    return evaluations, Evaluation.from_json(best) if best is not None else None


def _refuse_other_folder(out: Path) -> None:
    is_report = (out / NUMBERS).exists()
    if out.exists() and not is_report and (not out.is_dir() or any(out.iterdir())):
        raise StaleOutput(f"{out} is there and is not a report: name another folder, or remove it")


def _write_plots(runs: Sequence[Runs], folder: Path) -> None:
    # here and not above: matplotlib takes most of a second to import, and only a report needs it
    from vista.evaluation.plots import plot_calibration, plot_learning_curve, plot_slices, save_png

    figures: dict[str, Figure | None] = {_plot_name(by): plot_slices(runs, by) for by in _slices_present(runs)}
    if any(bins for r in runs for e in r.evaluations for bins in e.calibration.values()):
        figures["calibration.png"] = plot_calibration(runs)
    figures["learning_curve.png"] = plot_learning_curve(runs)
    for name, figure in figures.items():
        if figure is not None:
            save_png(figure, folder / name)


def _plot_name(by: str) -> str:
    return "by_" + by.replace(" ", "_") + ".png"


def _slices_present(runs: Sequence[Runs]) -> list[str]:
    present = {part.by for r in runs for e in r.evaluations for part in e.slices}
    return [by for by in SLICES if by in present]


def _slice_tables(runs: Sequence[Runs], by: str) -> list[Table]:
    return [slice_table(runs, task, by, key) for task in all_tasks(runs) for key in SLICE_KEYS]


def _protocol_table(runs: Sequence[Runs]) -> Table:
    """What all evaluations have in common; where they differ, every value."""
    protocols = [e.protocol for r in runs for e in r.evaluations]
    rows = []
    for name in dict.fromkeys(name for protocol in protocols for name in protocol):
        values = dict.fromkeys(_plain(p[name]) for p in protocols if name in p)
        rows.append((Cell(name.replace("_", " ")), Cell(", ".join(values))))
    return Table("Protocol", ("protocol", "value"), tuple(rows))


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _markdown(runs: Sequence[Runs], title: str, folder: Path) -> str:
    parts = [f"# {title}\n", overview_table(runs).to_markdown(), NOTE + "\n"]
    differences = difference_table(runs)
    if differences is not None:
        parts += [f"## {differences.title}\n", differences.to_markdown()]
    for by in _slices_present(runs):
        parts += [f"## By {by}\n", ABOUT_SLICES[by] + "\n", f"![By {by}]({_plot_name(by)})\n"]
        parts += [f"### {table.title}\n\n{table.to_markdown()}" for table in _slice_tables(runs, by)]
    for name in ("calibration", "learning_curve"):
        if (folder / f"{name}.png").exists():
            parts += [f"## {_heading(name)}\n", f"![{_heading(name)}]({name}.png)\n"]
    return "\n".join([*parts, "## Protocol\n", _protocol_table(runs).to_markdown()])


def _html(runs: Sequence[Runs], title: str, folder: Path) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", wide(overview_table(runs)), f'<p class="note">{html.escape(NOTE)}</p>']
    differences = difference_table(runs)
    if differences is not None:
        body += [f"<h2>{html.escape(differences.title)}</h2>", wide(differences)]
    for by in _slices_present(runs):
        body += [f"<h2>By {by}</h2>", f"<p>{ABOUT_SLICES[by]}</p>", image(folder / _plot_name(by), f"By {by}")]
        tables = (f"<div><h3>{html.escape(t.title)}</h3>{wide(t)}</div>" for t in _slice_tables(runs, by))
        body.append(f'<details><summary>numbers</summary><div class="tables">{"".join(tables)}</div></details>')
    for name in ("calibration", "learning_curve"):
        if (folder / f"{name}.png").exists():
            body += [f"<h2>{_heading(name)}</h2>", image(folder / f"{name}.png", _heading(name))]
    return page(title, [*body, "<h2>Protocol</h2>", wide(_protocol_table(runs))])


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page that needs nothing from elsewhere."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _heading(name: str) -> str:
    return name.replace("_", " ").capitalize()


def wide(table: Table) -> str:
    return f'<div class="wide">{table.to_html()}</div>'


def image(path: Path, text: str) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}">'
