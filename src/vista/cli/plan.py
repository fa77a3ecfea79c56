"""``vista plan``: how large a cluster must be for so many users."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vista.planning.plan import Demand, Machine, Plan
    from vista.planning.rates import ChosenRates

NAMES_S = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def plan(
    users: Annotated[float, typer.Option(help="Users, as in 1e8.")],
    events_per_day: Annotated[float, typer.Option(help="New events of a user per day, on average.")],
    history: Annotated[float, typer.Option(help="Events of a user so far, on average.")] = 10_000.0,
    requests_per_day: Annotated[float, typer.Option(help="Requests of a user per day, on average.")] = 20.0,
    refresh_s: Annotated[
        list[float] | None,
        typer.Option(
            help="A user's new events are taken in once in so many seconds; repeatable; default: 7200 and 10."
        ),
    ] = None,
    replicas: Annotated[float, typer.Option(help="Copies of everything that is stored.")] = 2,
    peak: Annotated[float, typer.Option(help="The busiest time, in multiples of the average.")] = 2.0,
    engine: Annotated[str, typer.Option(help="Engine of the store: lmdb or redis.")] = "lmdb",
    size: Annotated[str, typer.Option(help="Size of the model: tiny, small or base.")] = "base",
    run: Annotated[Path | None, typer.Option(help="Run folder: plan for this model, instead of one of a size.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting beside the size, as in --set model.memory=sum.")
    ] = None,
    codec: Annotated[str, typer.Option(help="How tokens are stored: int8, float16, bfloat16 or float32.")] = "int8",
    machine_cores: Annotated[float, typer.Option(help="Cores of a machine.")] = 32,
    machine_memory_gb: Annotated[float, typer.Option(help="Memory of a machine for records, GB.")] = 256.0,
    machine_disk_tb: Annotated[float, typer.Option(help="Disk of a machine for records, TB.")] = 8.0,
    machine_disk_gb_per_s: Annotated[float, typer.Option(help="What its disks can write all day, GB/s.")] = 1.0,
    machine_network_gbit: Annotated[float, typer.Option(help="Network of a machine, Gbit/s.")] = 25.0,
    bulk_event_us: Annotated[float | None, typer.Option(help="Core time of an event in bulk, us.")] = None,
    bulk_user_ms: Annotated[float | None, typer.Option(help="Core time of a user in bulk, beside events, ms.")] = None,
    refresh_ms: Annotated[float | None, typer.Option(help="Core time of a refresh of a user, ms.")] = None,
    refresh_event_us: Annotated[float | None, typer.Option(help="Core time of an event in a refresh, us.")] = None,
    read_us: Annotated[float | None, typer.Option(help="Core time of reading a user's tokens, us.")] = None,
    write_amplification: Annotated[
        float | None, typer.Option(help="Bytes written to disk per byte of record in a refresh.")
    ] = None,
    gpu_events_per_s: Annotated[
        float, typer.Option(help="What a GPU folds in bulk (bench/gpu.py measures it); 0: not known, no GPU hours.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say how many machines so many users need: storage, refresh traffic, core hours, network (docs/scaling.md).

    Bytes come from records that are made on the spot, core times from measurements: `python bench/plan.py` measures
    those of your machine and model, and prints the options to give here.
    """
    from vista import api
    from vista.planning.plan import Demand, Machine

    given = {
        "bulk_event_us": bulk_event_us, "bulk_user_ms": bulk_user_ms, "refresh_ms": refresh_ms,
        "refresh_event_us": refresh_event_us, "read_us": read_us, "write_amplification": write_amplification,
    }  # fmt: skip
    demand = Demand(users, events_per_day, history, requests_per_day, 1.0, replicas, peak, engine)
    demands = [replace(demand, refresh_s=seconds) for seconds in refresh_s or (7_200.0, 10.0)]
    machine = Machine(machine_cores, machine_memory_gb, machine_disk_tb, machine_disk_gb_per_s, machine_network_gbit)
    plans, rates = api.plan(
        demands, machine, size=size, run=run, overrides=overrides or [], codec=codec,
        rates={name: value for name, value in given.items() if value is not None}, gpu_events_per_s=gpu_events_per_s,
    )  # fmt: skip
    if as_json:
        typer.echo(_json(demands, machine, plans, rates))
        return
    for each, made in zip(demands, plans, strict=True):
        _print(each, made, is_first=made is plans[0])
    typer.echo(_source(rates))


def _json(demands: list[Demand], machine: Machine, plans: list[Plan], rates: ChosenRates) -> str:
    found = [
        {
            "demand": asdict(demand),
            "plan": {f"{line.name}, {line.unit}": line.value for lines in made.lines.values() for line in lines},
            "machines": made.num_machines, "bound_by": made.bound_by, "machines_by": made.machines,
        }
        for demand, made in zip(demands, plans, strict=True)
    ]  # fmt: skip
    return json.dumps({"plans": found, "machine": asdict(machine), "rates": asdict(rates)}, indent=2)


def _print(demand: Demand, made: Plan, is_first: bool) -> None:
    """A block; what does not depend on the interval only in the first."""
    if is_first:
        typer.echo(f"{demand.users:,.0f} users with {demand.history:,.0f} events, store: {demand.engine}")
    for title, lines in made.lines.items():
        depends = title in ("refreshed", "a new model version")
        if is_first or depends:
            typer.echo(f"\n{title}{f' every {_duration(demand.refresh_s)}' if title == 'refreshed' else ''}")
            for line in lines:
                typer.echo(f"  {line.name:<17}{_number(line.value):>14} {line.unit:<6} {line.formula}")
    needed = ", ".join(f"{name} {number:,}" for name, number in made.machines.items())
    typer.echo(
        f"\nmachines with a refresh every {_duration(demand.refresh_s)}: {made.num_machines:,}, for {made.bound_by} "
        f"({needed}; a peak of {demand.peak:g} times the average)"
    )


def _source(rates: ChosenRates) -> str:
    """Where core times come from, in one line."""
    text = f"core times: measured at size {rates.size} (docs/scaling.md)"
    if rates.given:
        text += f", but {', '.join('--' + name.replace('_', '-') for name in rates.given)} as given"
    if rates.is_near:
        text += "; this model has other settings: measure it with python bench/plan.py"
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in NAMES_S if seconds >= size), NAMES_S[-1])
    return f"{seconds / size:g} {unit}"
