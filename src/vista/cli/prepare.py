"""``vista prepare``: an event log to prepared data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    events: Annotated[str, typer.Argument(help="Event log: Parquet or CSV, a file, a folder or a quoted glob.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    items: Annotated[str | None, typer.Option(help="Items table: ids, categorical columns, float vectors.")] = None,
    impressions: Annotated[
        str | None,
        typer.Option(help="Impressions table: ids, time, one 0/1 column per task. Default: made from events."),
    ] = None,
    user_column: Annotated[str, typer.Option(help="Name of the user id column.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Name of the item id column.")] = "item_id",
    timestamp_column: Annotated[str, typer.Option(help="Name of the time column.")] = "timestamp",
    action_column: Annotated[
        str | None, typer.Option(help="Name of the action column; default: `action` where there is one.")
    ] = None,
    burst_column: Annotated[
        str | None, typer.Option(help="Events of a user with one value here are one impression; default: equal times.")
    ] = None,
    event_id_column: Annotated[
        str | None, typer.Option(help="Unique id of an event; default: item, time and action tell duplicates.")
    ] = None,
    time_unit: Annotated[str | None, typer.Option(help="s, ms, us or ns; default: inferred.")] = None,
    earliest: Annotated[str, typer.Option(help="Earlier times are an error.")] = "1990-01-01",
    latest: Annotated[str | None, typer.Option(help="Later times are an error; default: in ten years.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Label column of the impressions; default: all 0/1 columns; repeatable.")
    ] = None,
    context: Annotated[list[str] | None, typer.Option(help="Context column of the impressions; repeatable.")] = None,
    item_feature: Annotated[
        list[str] | None, typer.Option(help="Column of the items table to use; default: all that can be; repeatable.")
    ] = None,
    category_feature: Annotated[
        str | None, typer.Option(help="Item feature that category negatives go by; default: the first.")
    ] = None,
    max_history: Annotated[int, typer.Option(help="Newest events kept of a longer history.")] = 1_000_000,
    min_user_events: Annotated[int, typer.Option(help="Users with fewer events are left out.")] = 1,
    max_burst: Annotated[int | None, typer.Option(help="Larger bursts are left out; default: none is.")] = None,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep events that repeat one.")] = False,
    popularity_negatives: Annotated[int, typer.Option(help="Negatives per request made from events.")] = 4,
    category_negatives: Annotated[
        int, typer.Option(help="Negatives of the positive's category, where items have one.")
    ] = 4,
    history_negatives: Annotated[
        int, typer.Option(help="Negatives from the user's own past, last met about as long ago as the positive.")
    ] = 0,
    new_items: Annotated[
        bool, typer.Option("--new-items", help="Only candidates that the user had not met, the positive and negatives.")
    ] = False,
    max_requests: Annotated[
        int, typer.Option(help="Requests made from events at most (a uniform sample).")
    ] = 2_000_000,
    validation_fraction: Annotated[float, typer.Option(help="Share of the requests, by time.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Share of the requests, by time.")] = 0.1,
    validation_from: Annotated[str | None, typer.Option(help="Where validation begins, instead of a share.")] = None,
    test_from: Annotated[str | None, typer.Option(help="Where test begins, instead of a share.")] = None,
    unknown_buckets: Annotated[int, typer.Option(help="Item indices for ids the catalogue does not hold.")] = 4096,
    catalogue: Annotated[
        str | None, typer.Option(help="Run or data folder whose items and actions are meant; default: a new catalogue.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the negatives.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Prepare an event log: histories, requests, catalogue, split by time.

    Columns are `user_id`, `item_id`, `timestamp` and, where there is one, `action`; ids are integers or strings.
    Nothing is left behind when it fails. docs/data.md says what is done with bursts, duplicates and absurd times.
    """
    from vista.data.prepare import PrepareOptions, summary_lines
    from vista.data.prepare import prepare as run_prepare

    options = PrepareOptions(
        events=events, items=items, impressions=impressions, user_column=user_column, item_column=item_column,
        timestamp_column=timestamp_column, action_column=action_column, burst_column=burst_column,
        event_id_column=event_id_column, time_unit=time_unit, earliest=earliest, latest=latest,
        item_features=tuple(item_feature or ()), category_feature=category_feature, tasks=tuple(task or ()),
        context=tuple(context or ()), max_history=max_history, min_user_events=min_user_events, max_burst=max_burst,
        keep_duplicates=keep_duplicates, popularity_negatives=popularity_negatives,
        category_negatives=category_negatives, history_negatives=history_negatives,
        new_items=new_items, max_requests=max_requests, validation_fraction=validation_fraction,
        test_fraction=test_fraction, validation_from=validation_from, test_from=test_from,
        unknown_buckets=unknown_buckets, catalogue=catalogue, seed=seed,
    )  # fmt: skip
    manifest = run_prepare(options, out)
    if as_json:
        typer.echo(json.dumps(_as_json(manifest), indent=2))
        return
    for line in summary_lines(manifest):
        typer.echo(line)
    typer.echo(f"next: vista train {out} --out RUN")


def _as_json(manifest: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(manifest)
