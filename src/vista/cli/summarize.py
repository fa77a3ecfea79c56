"""``vista summarize`` and ``vista rank``: histories into a store, and rankings out of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from vista.cli.store import URL_HELP


def summarize(
    run: Annotated[Path, typer.Argument(help="Run folder of a vista or recent model.")],
    data: Annotated[Path, typer.Option(help="Prepared data folder.")],
    store: Annotated[str, typer.Option(help=URL_HELP)],
    codec: Annotated[str, typer.Option(help="How tokens are stored: int8, float16, bfloat16 or float32.")] = "int8",
    force: Annotated[bool, typer.Option("--all", help="Also users whose stored record is current.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Publish the version when all users are in the store.")
    ] = True,
) -> None:
    """Summarize every user's history into a store, and publish the model version.

    Only users with new events since their stored record; an interrupted run goes on where it stopped. With
    `--no-publish`, readers of the published version see no change until `vista store publish`.
    """
    from vista import api
    from vista.store.contract import shown

    report = api.summarize(run, data, store, codec=codec, force=force, publish=publish)
    done = "published" if publish else "not published:"
    typer.echo(
        f"summarized {report.num_users:,} users ({report.num_events:,} events), {report.num_current:,} were current; "
        f"{done} version {report.version} in {shown(store)}"
    )


def rank(
    run: Annotated[Path, typer.Argument(help="Run folder of the model version in the store.")],
    store: Annotated[str, typer.Option(help=URL_HELP)],
    user: Annotated[str, typer.Option(help="User id, as in the event log.")],
    candidates: Annotated[str, typer.Option(help="Item ids, separated by commas.")],
    at: Annotated[datetime | None, typer.Option(help="Moment of the request, UTC; default: now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score candidates for a user from the store, best first.

    A user the store does not know is answered from an empty history (cold start); an unknown item by its hash bucket.
    """
    from vista import api

    at_us = None if at is None else int(at.replace(tzinfo=at.tzinfo or UTC).timestamp() * 1_000_000)
    items = [text.strip() for text in candidates.split(",") if text.strip()]
    answer = api.rank(run, store, user, items, at_us)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    known = f"{answer['num_events']:,} events known" if answer["known_user"] else "not in the store: cold start"
    table = Table(title=f"user {user} ({known})")
    table.add_column("item")
    for task in answer["task_scores"]:
        table.add_column(task, justify="right")
    for place in sorted(range(len(items)), key=lambda i: -answer["scores"][i]):
        note = "" if answer["known_candidates"][place] else "  (not in the catalogue)"
        table.add_row(items[place] + note, *(f"{scores[place]:.4f}" for scores in answer["task_scores"].values()))
    Console().print(table)
