"""``vista export``: summaries as of many moments, as Parquet, to train other models from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of a vista model.")],
    data: Annotated[Path, typer.Option(help="Prepared data folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new, or one of an interrupted call.")],
    as_of: Annotated[
        str,
        typer.Option(help="borders: a row per segment border; times: a row per user and time asked for."),
    ] = "borders",
    requests: Annotated[
        str | None,
        typer.Option(
            help="Table of user ids and times (Parquet or CSV; file, folder or glob). Default: every border; with "
            "times, the data's own requests. With borders: only those that are the newest at one of these times."
        ),
    ] = None,
    codec: Annotated[str, typer.Option(help="How tokens are stored: float32 or float16.")] = "float32",
    user_column: Annotated[str, typer.Option(help="Column of the user id in the table.")] = "user_id",
    timestamp_column: Annotated[str, typer.Option(help="Column of the time in the table.")] = "timestamp",
    time_unit: Annotated[
        str | None, typer.Option(help="Unit of times that are numbers: s, ms, us or ns; default: by their size.")
    ] = None,
) -> None:
    """Write point-in-time summaries as Parquet, for models that are trained elsewhere (docs/lake.md).

    A row's `as_of` is the moment up to which it knows the user: each of its events happened strictly before. So a join
    of the newest row with `as_of` not after an impression never looks into the future. An interrupted call is gone on
    with by the same command.
    """
    from vista import api

    report = api.export(
        run, data, out, as_of=as_of, requests=requests, codec=codec, user_column=user_column,
        timestamp_column=timestamp_column, time_unit=time_unit,
    )  # fmt: skip
    kept = f", {report.num_kept:,} parts were there" if report.num_kept else ""
    unknown = f"; {report.num_unknown:,} requests are of users the data does not know" if report.num_unknown else ""
    typer.echo(
        f"exported {report.num_rows:,} summaries of version {report.version} in {report.num_parts:,} parts to "
        f"{out}{kept}{unknown}"
    )
