"""``vista forget``: events removed so that nothing stored still knows them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer


def forget(
    data: Annotated[Path, typer.Option(help="Prepared data folder to remove events from.")],
    store: Annotated[str, typer.Option(help="Store URL: a path or lmdb:PATH.")],
    user: Annotated[list[str], typer.Option(help="User id, as in the event log; repeatable.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders of the model versions in the store; none for --all.")
    ] = None,
    item: Annotated[str | None, typer.Option(help="The user's events of this item.")] = None,
    before: Annotated[datetime | None, typer.Option(help="The user's events before this moment, UTC.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of the user's events, and the user.")] = False,
    delete_others: Annotated[
        bool, typer.Option("--delete-others", help="Delete the user's records of versions whose run is not given.")
    ] = False,
) -> None:
    """Remove a user's events from prepared data and store, rebuild what was made of them, and verify the result.

    Killed at any moment, the same command completes it. Trained weights are not changed: docs/forgetting.md.
    """
    from vista import api

    before_us = None if before is None else int(before.replace(tzinfo=before.tzinfo or UTC).timestamp() * 1_000_000)
    report = api.forget(
        data, store, user, runs or [], item=item, before_us=before_us, everything=everything,
        delete_others=delete_others,
    )  # fmt: skip
    if report.num_completed:
        typer.echo("completed another forgetting that was begun here")
    if report.was_pending:
        typer.echo("completed what an earlier call began")
    is_nothing = not (report.num_events or report.num_requests)
    typer.echo(
        f"nothing to remove of user {', '.join(user)} in {data}"
        if is_nothing
        else f"removed {report.num_events:,} events, {report.num_requests:,} requests and {report.num_impressions:,} "
        f"impressions of user {', '.join(user)} from {data}"
    )
    typer.echo(
        f"{store}: records of {report.num_rebuilt:,} users and versions made anew, of {report.num_deleted:,} deleted; "
        f"{report.num_bytes_freed:,} bytes freed"
    )
    typer.echo("verified: data and store are as if these events had never been; trained weights still know them")
