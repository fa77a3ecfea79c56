"""``vista benchmark lifelong``: does the whole history pay, and which model makes the most of it?"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vista.cli.train import DEVICE_HELP

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
    config: Annotated[
        Path | None, typer.Option(help="A file that says set, preparation and models: configs/benchmark/NAME.toml.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder with a local copy of the public log of --config.")
    ] = None,
    worlds: Annotated[
        str | None,
        typer.Option(help="Synthetic worlds, separated by commas. Default: all, or none where a log is given."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Entries, separated by commas, as in counts,vista,din+counts; default: all.")
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate on test worlds that differ in a setting, as in events=2048,16384; or with stored tokens, as "
            "in codec=float32,int8; repeatable, the first is drawn."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas; default: 0,1,2.")] = None,
    size: Annotated[
        str | None, typer.Option(help="tiny, small or base: one dial for all widths; default: tiny.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of each run at most; default: 2000.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of all runs; repeatable.")
    ] = None,
    time_budget_s: Annotated[float, typer.Option(help="No run is begun after so many seconds; 0: no limit.")] = 0.0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Does lifelong history pay? Trains every entry with every seed on every set, and says so in one sentence per set.

    Finished runs are kept in OUT and not run again; Ctrl-C keeps the one under way, and the same command goes on.
    With `--config` other options overrule the file.
    """
    import torch

    from vista.benchmark.axes import sweep_axes
    from vista.benchmark.cells import run_plan
    from vista.benchmark.report import write_benchmark
    from vista.config import parse_overrides
    from vista.devices import chosen_device

    columns = {"user_column": user_column, "item_column": item_column, "timestamp_column": timestamp_column,
               "burst_column": burst_column}  # fmt: skip
    own = {"events": events, "items": items, "impressions": impressions, **columns}
    chosen = RunOptions(models, seeds, size, max_steps, parse_overrides(overrides or []))
    torch.set_num_threads(threads)
    plan = replace(_plan(config, source, own, worlds, axis or [], chosen), device=str(chosen_device(device)))
    cells = run_plan(plan, out, time_budget_s, typer.echo)
    sweeps = sweep_axes(plan, out, cells, typer.echo)
    typer.echo("")
    report = write_benchmark(plan, cells, out, ["vista", *sys.argv[1:]], sweeps)
    typer.echo(_verdicts(cells, plan.training))
    typer.echo(f"report: {report}")


@dataclass(frozen=True)
class RunOptions:
    """What is run, as the command line has it; None: not given."""

    models: str | None
    seeds: str | None
    size: str | None
    max_steps: int | None
    settings: dict[str, Any]


def _plan(
    config: Path | None,
    source: Path | None,
    own: dict[str, Any],
    worlds: str | None,
    axis: list[str],
    chosen: RunOptions,
) -> Any:
    """What the command line and the config file ask for. Raises ConfigError for what does not go together."""
    from vista.benchmark.axes import check_axes
    from vista.benchmark.cells import Plan
    from vista.benchmark.configs import RunChoice, read_config
    from vista.benchmark.entries import DEFAULT_ENTRIES, choose
    from vista.benchmark.sets import Axis
    from vista.errors import ConfigError

    choice = RunChoice(DEFAULT_ENTRIES, (0, 1, 2), "tiny", 2000)
    if config is not None:
        if own["events"] is not None or worlds is not None:
            raise ConfigError("--config says the set; leave out --events and --worlds")
        read = read_config(config, source)
        sets, choice = [read.one], choice.under(read.run)
    elif source is not None:
        raise ConfigError(
            f"--from {source}: of which public log? Name its file with --config configs/benchmark/NAME.toml"
        )
    else:
        sets = _sets(own, worlds)
    names = tuple(_names(chosen.models)) if chosen.models is not None else None
    if names == ():
        raise ConfigError(f"--models {chosen.models!r}: name at least one entry, as in counts,vista, or leave it out")
    seeds = _seeds(chosen.seeds) if chosen.seeds is not None else None
    choice = choice.under(RunChoice(names, seeds, chosen.size, chosen.max_steps, chosen.settings))
    given = Axis.parse(axis)
    if given is not None:
        sets = [replace(one, axis=given) for one in sets]
    training = {"train.max_steps": choice.max_steps, "train.max_epochs": 1000, **choice.settings}
    plan = Plan(sets, choose(choice.models or ()), list(choice.seeds or ()), choice.size or "tiny", training)
    check_axes(plan)
    return plan


def _sets(own: dict[str, Any], worlds: str | None) -> list[Any]:
    """The user's log, and worlds: those that are named, all where there is no log."""
    from vista.benchmark.sets import own_log
    from vista.benchmark.sets import worlds as world_sets
    from vista.data.prepare import PrepareOptions
    from vista.data.worlds.write import WORLDS

    sets = [] if own["events"] is None else [own_log(PrepareOptions(**own))]
    names = _names(worlds) if worlds is not None else [] if sets else list(WORLDS)
    return sets + world_sets(names, seed=0)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    """Each once. Raises ConfigError for none, and for what is no whole number."""
    from vista.errors import ConfigError

    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in _names(text)))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ConfigError(f"--seeds {text!r}: write whole numbers, separated by commas, as in 0,1,2")
    return seeds


def _verdicts(cells: dict[str, list[Any]], training: dict[str, Any]) -> str:
    from vista.benchmark.verdict import judge

    return "\n".join(judge(name, mine, training).sentence() for name, mine in cells.items() if mine)


@app.command()
def leave_one_out(
    events: Annotated[str, typer.Option(help="Event log: Parquet or CSV; file, folder or quoted glob.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and tables; a second call goes on there.")],
    user_column: Annotated[str, typer.Option(help="Name of the user id column.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Name of the item id column.")] = "item_id",
    order_column: Annotated[str, typer.Option(help="Name of the column a user's events are sorted by.")] = "timestamp",
    timestamp_column: Annotated[
        str | None, typer.Option(help="Name of the time column, for models that read times. Default: none is read.")
    ] = None,
    min_events: Annotated[int, typer.Option(help="Users and items with fewer events are left out (k-core).")] = 5,
    models: Annotated[
        str, typer.Option(help="Entries, separated by commas: popularity, sasrec, hstu, hstu-large, vista, recent.")
    ] = "popularity,sasrec,hstu,vista,recent",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    max_epochs: Annotated[int, typer.Option(help="Passes over the users at most.")] = 101,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of all runs, as in --set train.negatives=512; repeatable."),
    ] = None,
    time_budget_s: Annotated[float, typer.Option(help="No run is begun after so many seconds; 0: no limit.")] = 0.0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """The next-item protocol of the literature: each user's last item, ranked among all, beside published numbers.

    Finished runs are kept in OUT and not run again; Ctrl-C keeps the one under way, and the same command goes on.
    """
    import torch

    from vista.benchmark.leave_one_out.cells import LeaveOneOutPlan, run_leave_one_out
    from vista.benchmark.leave_one_out.entries import choose
    from vista.benchmark.leave_one_out.report import about, write_leave_one_out
    from vista.config import parse_overrides
    from vista.data.sequences import SequenceColumns, read_sequences
    from vista.devices import chosen_device

    place = str(chosen_device(device))
    torch.set_num_threads(threads)
    columns = SequenceColumns(user_column, item_column, order_column, timestamp_column)
    chosen, training = choose(_names(models)), {"train.max_epochs": max_epochs} | parse_overrides(overrides or [])
    for entry in chosen:
        entry.config(0, training)
    sequences = read_sequences(events, columns, min_events)
    typer.echo(about(sequences))
    plan = LeaveOneOutPlan(sequences, chosen, _seeds(seeds), training, place)
    cells = run_leave_one_out(plan, out, time_budget_s, typer.echo)
    table = write_leave_one_out(plan, cells, out, ["vista", *sys.argv[1:]])
    typer.echo("\n" + table.to_markdown())
    typer.echo(f"report: {out / 'leave-one-out.md'}")
