"""``vista stream``: events from a log into the states and tokens of a store, for as long as it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vista.cli.store import URL_HELP

if TYPE_CHECKING:
    from vista.jobs.stream_status import PartitionStatus

SOURCE_HELP = "Event log: dir:PATH, redis://host[:port][/db]?stream=NAME[&partitions=N], kafka://broker/topic."
Log = Annotated[
    str | None, typer.Option("--log", help="Name under which offsets are kept; default: that of the source.")
]

app = typer.Typer(name="stream", invoke_without_command=True, rich_markup_mode="markdown")


@app.callback()
def stream(
    context: typer.Context,
    source: Annotated[str | None, typer.Option(help=SOURCE_HELP)] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder of the model version to keep up to date.")] = None,
    store: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
    partitions: Annotated[
        str | None, typer.Option(help="Stream these partitions alone, separated by commas; default: all there will be.")
    ] = None,
    refresh_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="events=N|seconds=X",
            help="Write a user's tokens after so many new events, or so long after the first; repeatable.",
        ),
    ] = None,
    max_events: Annotated[int, typer.Option(help="Events of a micro-batch at most.")] = 1000,
    max_ms: Annotated[float, typer.Option(help="Milliseconds a micro-batch waits for more events at most.")] = 200.0,
    dead_letters: Annotated[
        Path, typer.Option(help="File for entries that cannot be applied, with the reason.")
    ] = Path("dead-letters.jsonl"),
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop when the log is read.")] = False,
    begin: Annotated[
        bool, typer.Option("--begin", help="Begin the model version where the store lacks it: all from the log.")
    ] = False,
    since: Annotated[
        datetime | None, typer.Option(help="Pass over events before this moment, UTC: the summarized data has them.")
    ] = None,
    keep_borders: Annotated[
        bool,
        typer.Option("--keep-borders", help="Keep borders, so that late events can be applied: docs/event-order.md."),
    ] = False,
    codec: Annotated[str, typer.Option(help="How tokens are stored: int8, float16, bfloat16 or float32.")] = "int8",
    log: Log = None,
    metrics_file: Annotated[Path | None, typer.Option(help="Write metrics here, in Prometheus' text format.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve them at /metrics on this port; 0: a free one.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No status line.")] = False,
) -> None:
    """Keep a store up to date: events from a log into states and tokens, each exactly once.

    Runs until Ctrl-C or SIGTERM, finishes its micro-batch and exits with 0; killed, it loses nothing. Needs `--source`,
    `--run` and `--store`.
    """
    if context.invoked_subcommand is not None:
        return
    from vista import api
    from vista.jobs.pending import Cadence
    from vista.models.borders import Spacing
    from vista.updates.apply import UpdateOptions

    for name, value in (("--source", source), ("--run", run), ("--store", store)):
        if value is None:
            raise typer.BadParameter("needs a value", param_hint=name)
    report = api.stream(
        run, source, store, stop_on_signals=True, dead_letters=dead_letters, partitions=_numbers(partitions),  # type: ignore[arg-type]
        cadence=Cadence.parse(refresh_after or []), max_events=max_events, max_ms=max_ms, until_end=until_end,
        begin=begin, since_us=0 if since is None else _us(since), log=log, metrics_file=metrics_file,
        metrics_port=metrics_port, quiet=quiet,
        update=UpdateOptions(spacing=Spacing() if keep_borders else None, codec=codec),
    )  # fmt: skip
    typer.echo(
        f"streamed {report.num_entries:,} events in {report.num_batches:,} micro-batches, wrote tokens "
        f"{report.num_refreshes:,} times; in all: {_counts(report.counts)}"
    )


@app.command()
def status(
    source: Annotated[str, typer.Option(help=SOURCE_HELP)],
    store: Annotated[str, typer.Option(help=URL_HELP)],
    log: Log = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far the streams of a log are: by model version and partition, events and seconds behind.

    Reads the store and the log, and needs no stream to be running.
    """
    from vista import api

    rows = api.stream_status(source, store, log)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if not rows:
        typer.echo("this log was never streamed into this store (by this name: see --log)")
        return
    _print(rows)


def _print(rows: list[PartitionStatus]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    from vista.cli.store import PLAIN_WIDTH
    from vista.progress import duration

    table = Table()
    for name in (
        "version",
        "partition",
        "offset",
        "end of log",
        "events behind",
        "seconds behind",
        "stored",
        "entries",
    ):
        table.add_column(name, overflow="fold")
    for row in rows:
        stored = datetime.fromtimestamp(row.updated_us / 1e6, UTC)
        table.add_row(
            row.version, str(row.partition), f"{row.offset:,}", f"{row.end:,}", f"{row.num_behind:,} events",
            duration(row.behind_s), f"{stored:%Y-%m-%d %H:%M:%S}", _counts(row.counts),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{num:,} {name}" for name, num in counts.items() if num) or "nothing"


def _us(moment: datetime) -> int:
    return int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1_000_000)


def _numbers(text: str | None) -> tuple[int, ...] | Any:
    from vista.errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--partitions {text!r}: write numbers separated by commas, as in 0,1") from None
