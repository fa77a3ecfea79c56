"""``vista demo``: the whole system in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; must be new or empty.")] = Path(
        "demo"
    ),
    events: Annotated[
        str | None, typer.Option(help="A real event log instead of the built-in world; columns as in vista prepare.")
    ] = None,
    items: Annotated[str | None, typer.Option(help="Items table of that log.")] = None,
    user_column: Annotated[str, typer.Option(help="Name of the user id column.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Name of the item id column.")] = "item_id",
    timestamp_column: Annotated[str, typer.Option(help="Name of the time column.")] = "timestamp",
    burst_column: Annotated[str | None, typer.Option(help="Events with one value here are one impression.")] = None,
) -> None:
    """The whole system in one go: data, training, store, ranking, table, report; in minutes on two cores.

    Trains VISTA and two controls (recent events only, plain counts), and prints each command it stands for. On the
    built-in world the best possible score is known and is in the table.
    """
    from vista.data.prepare import PrepareOptions
    from vista.demo import run_demo
    from vista.errors import ConfigError

    options = None
    if events is not None:
        options = PrepareOptions(
            events=events, items=items, user_column=user_column, item_column=item_column,
            timestamp_column=timestamp_column, burst_column=burst_column,
        )  # fmt: skip
    elif items is not None:
        raise ConfigError("--items belongs to a log of your own; give --events as well")
    run_demo(out, options)
