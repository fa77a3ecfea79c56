"""``vista benchmark lifelong``: does the whole history pay, and which model makes the most of it?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="benchmark",
    help="Compare models on worlds whose best score is known, on public logs and on your own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def lifelong(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report; a second call goes on there.")],
    events: Annotated[str | None, typer.Option(help="Your own event log; columns as in vista prepare.")] = None,
    items: Annotated[str | None, typer.Option(help="Items table of that log.")] = None,
    impressions: Annotated[str | None, typer.Option(help="Impressions table; default: made from events.")] = None,
    user_column: Annotated[str, typer.Option(help="Name of the user id column.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Name of the item id column.")] = "item_id",
    timestamp_column: Annotated[str, typer.Option(help="Name of the time column.")] = "timestamp",
    burst_column: Annotated[str | None, typer.Option(help="Events with one value here are one impression.")] = None,
    macports: Annotated[
        Path | None, typer.Option(help="A clone of the macports-ports git history, or a converted copy, to measure on.")
    ] = None,
    worlds: Annotated[
        str | None,
        typer.Option(help="Synthetic worlds, separated by commas. Default: all, or none where a log is given."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Entries, separated by commas, as in counts,vista,din+counts; default: all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    size: Annotated[str, typer.Option(help="tiny, small or base: one dial for all widths.")] = "tiny",
    max_steps: Annotated[int, typer.Option(help="Optimizer steps of each run at most.")] = 2000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of all runs; repeatable.")
    ] = None,
    time_budget_s: Annotated[float, typer.Option(help="No run is begun after so many seconds; 0: no limit.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Does lifelong history pay? Trains every entry with every seed on every set, and says so in one sentence per set.

    Finished runs are kept in OUT and not run again; Ctrl-C keeps the one under way, and the same command goes on.
    """
    import torch

    from vista.benchmark.cells import Plan, run_plan
    from vista.benchmark.entries import DEFAULT_ENTRIES, choose
    from vista.benchmark.report import write_benchmark
    from vista.benchmark.sets import macports as macports_set
    from vista.benchmark.sets import own_log
    from vista.benchmark.sets import worlds as world_sets
    from vista.cli.train import parse_overrides
    from vista.data.prepare import PrepareOptions
    from vista.data.worlds.write import WORLDS

    sets = []
    if events is not None:
        columns: dict[str, Any] = {"user_column": user_column, "item_column": item_column,
                                   "timestamp_column": timestamp_column, "burst_column": burst_column}  # fmt: skip
        sets.append(own_log(PrepareOptions(events, items, impressions, **columns)))
    if macports is not None:
        sets.append(macports_set(macports))
    default_worlds = [] if sets else list(WORLDS)
    sets += world_sets(_names(worlds) if worlds is not None else default_worlds, seed=0)
    torch.set_num_threads(threads)
    training = {"train.max_steps": max_steps, "train.max_epochs": 1000} | parse_overrides(overrides or [])
    plan = Plan(sets, choose(_names(models) if models else DEFAULT_ENTRIES), _seeds(seeds), size, training)
    cells = run_plan(plan, out, time_budget_s, typer.echo)
    typer.echo("")
    report = write_benchmark(plan, cells, out, ["vista", *sys.argv[1:]])
    typer.echo(_verdicts(cells))
    typer.echo(f"report: {report}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    """Raises ConfigError for what is no whole number."""
    from vista.errors import ConfigError

    try:
        return [int(seed) for seed in _names(text)]
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: write whole numbers, separated by commas, as in 0,1,2") from None


def _verdicts(cells: dict[str, list[Any]]) -> str:
    from vista.benchmark.verdict import judge

    found = (judge(name, mine) for name, mine in cells.items() if mine)
    return "\n".join(verdict.sentence() for verdict in found if verdict)
