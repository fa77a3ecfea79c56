"""``vista data ...``: event logs to work on: synthetic worlds, and public logs in the form ``vista prepare`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="data",
    help="Make or convert event logs: synthetic worlds with a known best score, and public data.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Out = Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")]


@app.command()
def synth(
    world: Annotated[
        str,
        typer.Argument(
            help="lifelong, needle, repetition, membership, drift, counting, periodic or dislike (docs/worlds.md)."
        ),
    ],
    out: Out,
    users: Annotated[int | None, typer.Option(help="Users in all.")] = None,
    events: Annotated[int | None, typer.Option(help="Events of each user.")] = None,
    items: Annotated[int | None, typer.Option(help="Items in all.")] = None,
    categories: Annotated[int | None, typer.Option(help="Categories in all.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests of each user.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Candidates of each request.")] = None,
    likes: Annotated[int | None, typer.Option(help="Likes of each user, in worlds that have them.")] = None,
    ages: Annotated[
        str | None, typer.Option(help="Ask about likes of these ages only, in events: 100,1000 (needle, repetition).")
    ] = None,
    same_item: Annotated[
        bool, typer.Option("--same-item", help="A hit shows the liked item itself (needle, repetition).")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed: the same one makes the same world.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as in --set p_hit=0.8; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a synthetic world: events, items and impressions whose best possible score is known.

    What is not given is the world's own default. Prepare it with
    `vista prepare OUT/events.parquet --items OUT/items.parquet --impressions OUT/impressions.parquet --out DATA`.
    """
    from vista.data.worlds import WorldOptions, write_world

    settings: dict[str, Any] = _parse_overrides(overrides or [])
    settings |= {} if likes is None else {"likes": likes}
    settings |= {} if ages is None else {"ages": ages}
    settings |= {"same_item": True} if same_item else {}
    options = WorldOptions(users, events, items, categories, requests, candidates, seed, settings)
    described = write_world(world, out, options)
    if as_json:
        _print_json(described)
        return
    typer.echo(
        f"world {world}: {described['num_events']:,} events, {described['num_impressions']:,} impressions in {out}"
    )
    for task, scores in described["tasks"].items():
        for name in ("best", "recent_only_best", "history_blind_best"):
            what = name.replace("_", " ")
            if name == "recent_only_best":
                what += f" ({scores[name]['recent_events']} events)"
            typer.echo(f"{task}, {what}: NE {_number(scores[name]['ne'])}, AUC {_number(scores[name]['auc'])}")
    typer.echo(
        f"next: vista prepare {out}/events.parquet --items {out}/items.parquet "
        f"--impressions {out}/impressions.parquet --out DATA"
    )


def _parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``likes=4`` to {"likes": "4"}. Raises ConfigError where there is no ``=``."""
    from vista.errors import ConfigError

    parsed = {}
    for pair in pairs:
        setting, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: write it as --set p_hit=0.8")
        parsed[setting.strip()] = value.strip()
    return parsed


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _print_json(values: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(values, indent=2, allow_nan=False))


Source = Annotated[
    Path | None, typer.Option("--from", help="Folder with a local copy; without it the data is downloaded.")
]


@app.command()
def movielens(
    out: Out,
    source: Source = None,
    variant: Annotated[
        str, typer.Option(help="What to download: ml-latest-small, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, ml-latest.")
    ] = "ml-1m",
    exact_times: Annotated[
        bool, typer.Option("--exact-times", help="Only users all of whose times are exact, where the copy says so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Film ratings (MovieLens); for your own research, not to be passed on."""
    from vista.data.public import MovielensOptions, convert_movielens

    _report(convert_movielens(out, source, MovielensOptions(variant, exact_times)), out, "", as_json)


@app.command()
def macports(
    out: Out,
    source: Source = None,
    max_burst: Annotated[int, typer.Option(help="Commits of more packages are left out; 0: none is.")] = 50,
    min_user_events: Annotated[int, typer.Option(help="Users with fewer events are left out.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Who changed which package of MacPorts, since 2002: few people, very long histories.

    `--from` takes any clone of the macports-ports git history.
    """
    from vista.data.public import MacportsOptions, convert_macports

    summary = convert_macports(out, source, MacportsOptions(max_burst, min_user_events))
    _report(summary, out, " --burst-column burst", as_json)


Copy = Annotated[Path, typer.Option("--from", help="Folder with a local copy, as published.")]


@app.command()
def kuairand(
    out: Out,
    source: Copy,
    variant: Annotated[str, typer.Option(help="Which version the copy is: 1k, 27k or pure.")] = "1k",
    max_impressions: Annotated[
        int, typer.Option(help="At most about so many impressions, a uniform sample of the moments; 0: all.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Short videos shown in April and May 2022, with real impressions and their labels (KuaiRand)."""
    from vista.data.public import KuairandOptions, convert_kuairand

    summary = convert_kuairand(out, source, KuairandOptions(variant, max_impressions))
    _report(summary, out, f" --impressions {out}/impressions.parquet --context tab", as_json)


@app.command()
def taobao(
    out: Out,
    source: Copy,
    actions: Annotated[str, typer.Option(help="Behaviours kept as events, separated by commas.")] = "pv,buy,cart,fav",
    as_json: AsJson = False,
) -> None:
    """Clicks and purchases of a million people in nine days of 2017 (Taobao UserBehavior)."""
    from vista.data.public import TaobaoOptions, convert_taobao

    _report(convert_taobao(out, source, TaobaoOptions(actions)), out, "", as_json)


@app.command()
def amazon(
    out: Out,
    source: Copy,
    category: Annotated[str, typer.Option(help="Part of the data, as its files are called.")] = "Electronics",
    as_json: AsJson = False,
) -> None:
    """Product reviews of 2014, 5-core (Amazon); short histories."""
    from vista.data.public import AmazonOptions, convert_amazon

    _report(convert_amazon(out, source, AmazonOptions(category)), out, "", as_json)


@app.command()
def yambda(
    out: Out,
    source: Copy,
    size: Annotated[str, typer.Option(help="50m, 500m or 5b.")] = "50m",
    layout: Annotated[str, typer.Option(help="flat or sequential: which of the published folders to read.")] = "flat",
    actions: Annotated[
        str,
        typer.Option(help="Files to read, separated by commas: listens, likes, dislikes, unlikes, undislikes."),
    ] = "listens,likes,dislikes",
    with_skips: Annotated[bool, typer.Option(help="Keep listens broken off before half of the track.")] = True,
    as_json: AsJson = False,
) -> None:
    """What up to a million people listened to and liked (Yambda); up to five billion events."""
    from vista.data.public import YambdaOptions, convert_yambda

    _report(convert_yambda(out, source, YambdaOptions(size, layout, actions, with_skips)), out, "", as_json)


def _report(summary: dict[str, Any], out: Path, flags: str, as_json: bool) -> None:
    """What was written, and the command that goes on from it."""
    if as_json:
        _print_json(summary)
        return
    typer.echo(
        f"{summary['num_events']:,} events of {summary['num_users']:,} users, {summary['num_items']:,} items in {out}"
    )
    typer.echo(f"next: vista prepare {out}/events.parquet --items {out}/items.parquet{flags} --out DATA")
