"""``vista store ...``: the model versions of a summary store: which there are, which one is published, which can go."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vista.store.contract import SummaryStore

app = typer.Typer(
    name="store",
    help="List, publish, roll back and remove the model versions of a summary store.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

URL_HELP = "Store URL: a path or lmdb:PATH, redis://[user:password@]host[:port][/db], unix:SOCKET."
PLAIN_WIDTH = 120  # characters of a table that is not read on a terminal
Url = Annotated[str, typer.Argument(metavar="STORE", help=URL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_versions(store: Url, as_json: AsJson = False) -> None:
    """Show every version: users of those expected, tokens, bytes by kind, and which is published.

    Looks at the size of every record, and reads none.
    """
    from vista.store.contract import open_store

    with open_store(store, read_only=True) as opened:
        rows = _rows(opened)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} model versions")
    for name in ("version", "status", "begun"):
        table.add_column(name)
    for name in ("users", "tokens", "records", "bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        kinds = row["kinds"].values()
        table.add_row(
            row["version"], row["status"], row["created"], f"{row['num_users']:,} of {row['expected_users']:,}",
            f"{row['num_tokens']} x {row['width']}", f"{sum(kind['records'] for kind in kinds):,}",
            f"{sum(kind['bytes'] for kind in kinds):,}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _rows(store: SummaryStore) -> list[dict[str, Any]]:
    """What ``list`` shows, one row per version, oldest first."""
    from datetime import UTC, datetime

    status = {store.previous(): "to roll back to", store.published(): "published"}
    kinds: dict[str, dict[str, dict[str, int]]] = {}
    for found in store.statistics():
        kinds.setdefault(found.version, {})[found.kind] = {"records": found.num_records, "bytes": found.num_bytes}
    return [
        info.to_json()
        | {
            "created": datetime.fromtimestamp(info.created_us / 1e6, UTC).isoformat(timespec="seconds"),
            "status": status.get(info.version, "complete" if info.is_complete else "not complete"),
            "kinds": kinds.get(info.version, {}),
        }
        for info in store.versions()
    ]


@app.command()
def publish(
    store: Url,
    version: Annotated[str, typer.Argument(help="Model version, as `vista store list` shows it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also a version whose bulk run has not ended, or that lacks users.")
    ] = False,
) -> None:
    """Make a version the published one, in one atomic step.

    Refuses a version that holds fewer than 99 in a hundred of the users expected.
    """
    with _open_existing(store) as opened:
        opened.publish(version, force)
        previous = opened.previous()
    typer.echo(
        f"published version {version} in {_shown(store)}; a rollback would publish {previous or 'none: the first'}"
    )


@app.command()
def rollback(store: Url) -> None:
    """Publish again what was published before, in one atomic step; once more undoes it."""
    with _open_existing(store) as opened:
        version = opened.rollback()
    typer.echo(f"rolled back: published version {version} in {_shown(store)}")


@app.command()
def gc(
    store: Url,
    keep: Annotated[int, typer.Option(min=0, help="Keep so many of the versions not in use, the newest.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Remove the versions that are neither published nor the one to roll back to.

    A version that is being written or waits to be published counts as one of them: where there may be one, use
    `--keep 1`.
    """
    from vista.store.contract import collect

    with _open_existing(store) as opened:
        num_before = len(opened.versions())
        num_bytes = collect(opened, keep)
    if as_json:
        typer.echo(json.dumps(num_bytes, indent=2))
        return
    for version, size in num_bytes.items():
        typer.echo(f"removed version {version}: {size:,} bytes")
    typer.echo(f"removed in all: {len(num_bytes)} of {num_before} versions, {sum(num_bytes.values()):,} bytes")


def _open_existing(url: str) -> SummaryStore:
    """A store to be written that is there: a path with a typing error must not become an empty store."""
    from vista.store.contract import open_store

    open_store(url, read_only=True).close()
    return open_store(url)


def _shown(url: str) -> str:
    from vista.store.contract import shown

    return shown(url)
