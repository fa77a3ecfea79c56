"""``vista summarize`` and ``vista rank``: histories into a store, and rankings out of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vista.cli.store import URL_HELP
from vista.cli.train import DEVICE_HELP

if TYPE_CHECKING:
    from vista.jobs.summarize import SummarizeReport

EXIT_FAILED_USERS = 3  # the rest was done
MOST_FAILED_SHOWN = 10  # by name; a Python call returns all of them


def summarize(
    run: Annotated[Path, typer.Argument(help="Run folder of a vista or recent model.")],
    data: Annotated[Path, typer.Option(help="Prepared data folder.")],
    store: Annotated[str, typer.Option(help=URL_HELP)],
    codec: Annotated[str, typer.Option(help="How tokens are stored: int8, float16, bfloat16 or float32.")] = "int8",
    all_users: Annotated[bool, typer.Option("--all", help="Also users whose stored record is current.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Publish the version when all users are in the store.")
    ] = True,
    engine: Annotated[str, typer.Option(help="Where the work is done: local (this machine) or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes that read histories; default: one per core, if there is enough to do.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster (with --engine ray); default: one that runs here, else a new one.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"{DEVICE_HELP} A GPU is fed by one process.")] = "cpu",
) -> None:
    """Summarize every user's history into a store, and publish the model version.

    Only users with new events since their stored record; an interrupted run goes on where it stopped. With
    `--no-publish`, readers of the published version see no change until `vista store publish`.

    A user that cannot be summarized is left out and named at the end, and the command ends with status 3; the same
    command takes up those alone. Too many of them, and the version is not published. See docs/bulk.md.
    """
    from vista import api
    from vista.store.contract import shown

    report = api.summarize(
        run, data, store, codec=codec, all_users=all_users, publish=publish, engine=engine, workers=workers,
        ray_address=ray_address, device=device,
    )  # fmt: skip
    done = "published" if report.is_published else "not published:"
    typer.echo(
        f"summarized {report.num_users:,} users ({report.num_events:,} events), {report.num_current:,} were current; "
        f"{done} version {report.version} in {shown(store)}"
    )
    if report.failed:
        _report_failed(report)
        raise typer.Exit(EXIT_FAILED_USERS)


def _report_failed(report: SummarizeReport) -> None:
    """Who has no new record and why, and how to go on."""
    for user in report.failed[:MOST_FAILED_SHOWN]:
        typer.echo(f"failed: user {user.user_id}: {user.reason}", err=True)
    if len(report.failed) > MOST_FAILED_SHOWN:
        typer.echo(f"failed: {len(report.failed) - MOST_FAILED_SHOWN:,} more", err=True)
    typer.echo(
        f"{len(report.failed):,} of {report.num_expected:,} users failed; mend what is said above, then run the same "
        "command again: it takes up only who is missing",
        err=True,
    )
    if not report.is_complete:
        typer.echo(
            f"too many for version {report.version} to be published; to do it all the same: "
            f"vista store publish STORE {report.version} --force",
            err=True,
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
