"""From a world's name to a folder of tables that ``vista prepare`` reads.

    OUT/
      events.parquet        user_id, item_id, timestamp (epoch seconds), action ("view", "like" or "dislike")
      items.parquet         item_id, category
      impressions.parquet   user_id, item_id, timestamp, click (0 or 1), best_score: the true P(click | history)
      details.parquet       per impression, in the same order: user_id, item_id, timestamp, recent_only_score, and what
                            explains the score (`World.details`). For slicing results; never an input of a model.
      world.json            name, seed, parameters, formula, sizes, and per task the best NE and AUC there can be

Shape letters: N events, Q requests, C candidates, M impressions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vista.data.output import new_folder
from vista.data.worlds.base import ACTIONS, Log, Requests, World, draw_times
from vista.data.worlds.best import cell_means, expected
from vista.data.worlds.counting import Counting
from vista.data.worlds.dislike import Dislike
from vista.data.worlds.membership import Membership
from vista.data.worlds.needle import Needle, Repetition
from vista.data.worlds.periodic import Periodic
from vista.data.worlds.taste import Drift, Lifelong
from vista.errors import ConfigError, nearest
from vista.progress import Progress

FORMAT_VERSION = 1  # of world.json
TASK = "click"
WORLDS: dict[str, type[World]] = {
    w.name: w for w in (Lifelong, Needle, Repetition, Membership, Drift, Counting, Periodic, Dislike)
}
ROWS_AT_ONCE = 1_000_000  # events are written in groups of at least so many
NUM_MOMENTS = 8  # parts of the timeline that a model which knows the time of a request can tell apart

EVENTS_SCHEMA = pa.schema(
    {"user_id": pa.int64(), "item_id": pa.int64(), "timestamp": pa.int64(), "action": pa.string()}
)


@dataclass(frozen=True)
class WorldOptions:
    """Sizes of a world, each None for the world's own default, and other settings of it by name."""

    users: int | None = None
    events: int | None = None
    items: int | None = None
    categories: int | None = None
    requests: int | None = None
    candidates: int | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """What is not left to the world."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return {name: value for name, value in own.items() if value is not None} | dict(self.settings)


def make_world(name: str, options: WorldOptions | None = None) -> World:
    """The world of that name. Raises ConfigError for an unknown name or setting, or one out of range."""
    if name not in WORLDS:
        raise ConfigError(f"there is no world {name!r}{nearest(name, WORLDS)}")
    kind, given = WORLDS[name], (options or WorldOptions()).given()
    types = {f.name: str(f.type) for f in fields(kind)}
    for setting in given:
        if setting not in types:
            raise ConfigError(f"world {name!r} has no setting {setting!r}{nearest(setting, types)}")
    return kind(**{setting: _parse(name, setting, value, types[setting]) for setting, value in given.items()})


def _parse(world: str, setting: str, value: Any, kind: str) -> Any:
    """A setting's value, perhaps a string from the command line, as the type of its field."""
    try:
        match kind:
            case "int":
                if isinstance(value, float):
                    raise ValueError
                return int(value)
            case "float":
                return float(value)
            case "bool":
                return {"true": True, "false": False}[str(value).lower()]
            case _:  # tuple[int, ...]
                return tuple(int(v) for v in (value.split(",") if isinstance(value, str) else value))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"world {world!r}: {setting} = {value!r} is no {kind}") from error


@dataclass(frozen=True)
class UserPart:
    """One user of a world: events with times (N,), requests with times (Q,), and per candidate (Q, C) label and p."""

    log: Log
    event_s: np.ndarray
    requests: Requests
    request_s: np.ndarray
    click: np.ndarray
    best_score: np.ndarray


def draw_user(world: World, user: int) -> UserPart:
    """User number ``user`` of a world, always the same one however many others there are."""
    name_code = int.from_bytes(world.name.encode(), "little")
    rng = np.random.default_rng([world.seed, name_code, user])
    log, requests = world.draw(rng)
    event_s, request_s = draw_times(rng, len(log.item), requests.num_known, world.span_days)
    best_score = world.best_score(log, requests)
    click = (rng.random(best_score.shape) < best_score).astype(np.int8)
    return UserPart(log, event_s, requests, request_s, click, best_score)


def write_world(name: str, out: Path, options: WorldOptions | None = None) -> dict[str, Any]:
    """Write a world into a new folder; what is in its world.json. Uses memory for one user and all impressions.

    Raises ConfigError for a world or setting that does not exist or is out of range, and StaleOutput when ``out`` is
    not an empty or new folder.
    """
    world = make_world(name, options)
    with new_folder(out) as folder:
        impressions, num_events = _write_events(world, folder / "events.parquet")
        item = np.arange(world.items)
        items = pa.table({"item_id": item, "category": world.category_of(item)})
        pq.write_table(items, folder / "items.parquet")
        shown = {name: impressions[name] for name in ("user_id", "item_id", "timestamp", TASK, "best_score")}
        pq.write_table(pa.table(shown), folder / "impressions.parquet")
        facts = {name: values for name, values in impressions.items() if name.startswith("detail_")}
        details = {name: impressions[name] for name in ("user_id", "item_id", "timestamp", "recent_only_score")}
        details |= {name.removeprefix("detail_"): values for name, values in facts.items()}
        pq.write_table(pa.table(details), folder / "details.parquet")
        described = _describe(world, impressions, num_events)
        (folder / "world.json").write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")
    return described


def _write_events(world: World, path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Write all users' events; the impressions as columns, and the number of events."""
    columns: dict[str, list[np.ndarray]] = {}
    num_events = 0
    with pq.ParquetWriter(path, EVENTS_SCHEMA) as writer:
        for table, shown in _groups(world):
            writer.write_table(table)
            num_events += len(table)
            for part in shown:
                for name, values in part.items():
                    columns.setdefault(name, []).append(values)
    impressions = {name: np.concatenate(parts) for name, parts in columns.items()}
    facts = {kind: [v for n, v in impressions.items() if n.startswith(kind)] for kind in ("visible_", "blind_")}
    for kind, score in (("visible_", "recent_only_score"), ("blind_", "history_blind_score")):
        impressions[score] = cell_means(impressions["best_score"], impressions["moment"], *facts[kind])
    return impressions, num_events


def _groups(world: World) -> Iterator[tuple[pa.Table, list[dict[str, np.ndarray]]]]:
    """Events of some users at a time, and their impressions."""
    tables: list[pa.Table] = []
    shown: list[dict[str, np.ndarray]] = []
    with Progress(f"synth {world.name}", total=world.users * world.events, unit="events") as progress:
        for user in range(world.users):
            part = draw_user(world, user)
            tables.append(_event_table(user, part))
            shown.append(_impressions(world, user, part))
            progress.advance(len(part.event_s))
            if sum(map(len, tables)) >= ROWS_AT_ONCE or user == world.users - 1:
                yield pa.concat_tables(tables).combine_chunks(), shown
                tables, shown = [], []


def _event_table(user: int, part: UserPart) -> pa.Table:
    action = pa.DictionaryArray.from_arrays(part.log.action.astype(np.int8), list(ACTIONS)).cast(pa.string())
    columns = [np.full(len(part.event_s), user), part.log.item, part.event_s, action]
    return pa.table(dict(zip(EVENTS_SCHEMA.names, columns, strict=True)), schema=EVENTS_SCHEMA)


def _impressions(world: World, user: int, part: UserPart) -> dict[str, np.ndarray]:
    """One user's impressions as columns (M,): those of the table, ``detail_`` facts, and what a model knows that sees
    the last events alone (``visible_``) or none (``blind_``). """  # fmt: skip
    shape = part.click.shape
    columns = {
        "user_id": np.full(shape, user),
        "item_id": part.requests.item,
        "timestamp": np.broadcast_to(part.request_s[:, None], shape),
        TASK: part.click,
        "best_score": part.best_score,
        "moment": np.broadcast_to((part.requests.num_known * NUM_MOMENTS // world.events)[:, None], shape),
    }
    statistics = {"visible_": world.statistics(part.log, part.requests, world.recent_events),
                  "blind_": world.statistics(part.log, part.requests, 0),
                  "detail_": world.details(part.log, part.requests)}  # fmt: skip
    for kind, known in statistics.items():
        columns |= {kind + name: values for name, values in known.items()}
    return {name: np.ascontiguousarray(values).reshape(-1) for name, values in columns.items()}


def _describe(world: World, impressions: dict[str, np.ndarray], num_events: int) -> dict[str, Any]:
    """The content of world.json."""
    truth = impressions["best_score"]
    scores = {
        "best": expected(truth, truth),
        "recent_only_best": {"recent_events": world.recent_events} | expected(truth, impressions["recent_only_score"]),
        "history_blind_best": expected(truth, impressions["history_blind_score"]),
    }
    return {
        "name": world.name,
        "seed": world.seed,
        "format_version": FORMAT_VERSION,
        "formula": world.formula,
        "parameters": asdict(world),
        "num_events": num_events,
        "num_impressions": len(truth),
        "tasks": {TASK: {"mean_score": float(truth.mean()), "click_rate": float(impressions[TASK].mean()), **scores}},
    }
