"""``vista evaluate``: how good runs are on a split, as a table, as JSON, as a report with plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vista.cli.train import DEVICE_HELP


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; seeds of one model are averaged.")],
    data: Annotated[Path, typer.Option(help="Prepared data folder the runs were trained on.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    full_ranking: Annotated[
        bool, typer.Option("--full-ranking", help="Also HR@K and NDCG@K among the whole catalogue (slow).")
    ] = False,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    report: Annotated[Path | None, typer.Option(help="Folder for a report: HTML, Markdown, JSON and plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead of a table.")] = False,
) -> None:
    """Evaluate runs: NE, log loss, AUC, GAUC, calibration; by history length, distance and source of negatives."""
    from vista.checkpoint import load_run
    from vista.data.histories import PreparedData
    from vista.devices import chosen_device
    from vista.errors import ConfigError, nearest
    from vista.evaluation.evaluate import best_possible, model_names
    from vista.evaluation.evaluate import evaluate as evaluate_run
    from vista.evaluation.report import write_report
    from vista.evaluation.tables import render_table
    from vista.schema import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"--split {split!r}: unknown{nearest(split, SPLITS)}")
    place, prepared = str(chosen_device(device)), PreparedData.open(data)
    loaded = [load_run(run, place) for run in runs]
    evaluations = [
        replace(evaluate_run(run, prepared, split, full_ranking), model=name)
        for run, name in zip(loaded, model_names(loaded), strict=True)
    ]
    best = best_possible(prepared, split)
    if as_json:
        both = {"evaluations": [e.to_json() for e in evaluations], "best_possible": best.to_json() if best else None}
        typer.echo(json.dumps(both, indent=2, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(render_table(evaluations, best))
    if report is not None:
        typer.echo(f"report: {write_report(evaluations, report, best)}", err=as_json)
