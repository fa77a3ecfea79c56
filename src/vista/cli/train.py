"""``vista train``: prepared data to a run folder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

DEVICE_HELP = "Where models compute: cpu, cuda or cuda:NUMBER."


def train(
    data: Annotated[Path, typer.Argument(help="Prepared data folder (vista prepare).")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="vista (default); recent (no summary), counts (no sequence model); mean, din, sim, twin, sasrec, hstu "
            "(the field's). With +counts behind it, as in vista+counts, exact counts are read as well."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="tiny, small or base: one dial for all widths; default: small.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with tables [model] and [train].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and of the order of users.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Passes over the training requests at most.")] = None,
    time_budget_s: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; 1 is often fastest for tiny. Default: one per core.")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as in --set model.memory=sum; repeatable.")
    ] = None,
    shard_items: Annotated[
        bool, typer.Option("--shard-items", help="Under torchrun: each process holds a part of the item table only.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on from the last checkpoint of the run folder, with its settings where none are given; how "
            "long, as in --max-steps, may be said anew."
        ),
    ] = False,
) -> None:
    """Train a model on prepared data. Ctrl-C keeps a checkpoint; --resume goes on from it.

    In several processes: torchrun --nproc-per-node 2 -m vista.cli.main train ... with the same options.
    """
    import torch

    from vista.checkpoint import load_description, load_run
    from vista.config import parse_overrides, resolve
    from vista.data.histories import PreparedData
    from vista.devices import chosen_device
    from vista.training.loop import train as run_training
    from vista.training.processes import own_rank

    place = chosen_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    given = {"model.model": model, "train.seed": seed, "train.max_steps": max_steps, "train.max_epochs": max_epochs,
             "train.time_budget_s": time_budget_s}  # fmt: skip
    chosen = {key: value for key, value in given.items() if value is not None} | parse_overrides(overrides or [])
    if resume:
        resolved = resolve(size, config, chosen, load_description(out)[0])
    else:
        resolved = resolve(size or "small", config, chosen)
    try:
        run_training(PreparedData.open(data), out, resolved, resume, shard_items=shard_items, device=place)
    except KeyboardInterrupt:
        if own_rank() == 0:
            raise
        raise typer.Exit(128 + signal.SIGINT) from None  # the first one speaks for all
    if own_rank() > 0:
        return
    run = load_run(out)
    typer.echo(f"trained {out}: model {resolved.model.model}, version {run.version}")
    typer.echo(f"next: vista evaluate {out} --data {data}")
