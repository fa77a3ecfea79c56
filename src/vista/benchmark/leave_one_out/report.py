"""The table of a leave-one-out run, as Markdown, beside what was published.

OUT/leave-one-out.md     table, learning curve of runs under way, protocol, versions
OUT/results.json         all cells
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vista.benchmark.leave_one_out.cells import LeaveOneOutPlan, NextItemCell
from vista.benchmark.leave_one_out.entries import PUBLISHED_SET, Entry
from vista.benchmark.leave_one_out.training import CHOSEN_BY, load_curve
from vista.benchmark.machine import machine, versions
from vista.checkpoint import write_text
from vista.data.sequences import Sequences
from vista.evaluation.metrics import mean_and_standard_error
from vista.evaluation.tables import Cell, Table

SHOWN = ("hr@10", "ndcg@10", "hr@50", "mrr")
NOTE = (
    "Leave-one-out, ranked among all items but those of the newest {length} events before the target. ±: standard "
    "error over seeds; that of one HR@10 over users is about {error:.4f}."
)


def write_leave_one_out(
    plan: LeaveOneOutPlan, cells: Sequence[NextItemCell], out: Path, command: Sequence[str]
) -> Table:
    """Write both files; the table."""
    table = results_table(plan.sequences, cells)
    under_way = curves_table(plan, cells, out)
    lines = ["# Leave-one-out", "", f"Command: `{shlex.join(command)}`", "", about(plan.sequences), "", _note(plan), ""]
    lines += [f"{versions()}, {plan.device}.", "", f"{machine()}.", "", table.to_markdown()]
    if under_way.rows:
        lines += [f"## {under_way.title}", "", under_way.to_markdown()]
    write_text(out / "leave-one-out.md", "\n".join(lines))
    values: dict[str, Any] = {"data": plan.sequences.fingerprint, "cells": [asdict(cell) for cell in cells]}
    write_text(out / "results.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
    return table


def about(sequences: Sequences) -> str:
    return (
        f"{sequences.num_users:,} users, {sequences.num_items:,} items, {len(sequences.item):,} events; "
        f"fingerprint {sequences.fingerprint}."
    )


def results_table(sequences: Sequences, cells: Sequence[NextItemCell]) -> Table:
    """A row per entry: mean and standard error over seeds, published numbers beside them."""
    published = PUBLISHED_SET.of(sequences)
    entries = list(dict.fromkeys(c.entry for c in cells))
    rows = []
    for entry in entries:
        mine = [c for c in cells if c.entry == entry]
        estimates = [mean_and_standard_error([c.metrics[name] for c in mine]) for name in SHOWN]
        theirs = published.get(entry)
        epochs = ", ".join(f"{c.best_epoch} of {len(c.curve)}" for c in mine if c.curve)
        texts = (*map(str, estimates), " / ".join(f"{value:.4f}" for value in theirs) if theirs else "-", epochs or "-")
        rows.append((Cell(entry), Cell(str(len(mine))), *map(Cell, texts)))
    header = ("model", "runs", *map(str.upper, SHOWN), "published HR@10 / NDCG@10", "best epoch of")
    return Table("Test", header, tuple(rows))


def curves_table(plan: LeaveOneOutPlan, cells: Sequence[NextItemCell], out: Path) -> Table:
    """What validation says of runs that are not over: a row per run."""
    done = {(c.entry, c.seed) for c in cells}
    rows = []
    for seed in plan.seeds:
        for entry in plan.entries:
            curve = load_curve(plan.folder(entry, seed, out)) if entry.is_trained else []
            if curve and (entry.name, seed) not in done:
                rows.append(_curve_row(entry, seed, curve))
    header = ("model", "seed", "epochs so far", "best epoch", "validation HR@10", "validation NDCG@10")
    return Table("Not over", header, tuple(rows))


def _curve_row(entry: Entry, seed: int, curve: Sequence[dict[str, Any]]) -> tuple[Cell, ...]:
    best = max(curve, key=lambda record: record[CHOSEN_BY])
    texts = (entry.name, seed, len(curve), best["epoch"], f"{best['hr@10']:.4f}", f"{best['ndcg@10']:.4f}")
    return tuple(Cell(str(text)) for text in texts)


def _note(plan: LeaveOneOutPlan) -> str:
    length = plan.entries[0].config(0, plan.overrides).train.length
    return NOTE.format(length=length, error=(0.3 * 0.7 / plan.sequences.num_users) ** 0.5)
