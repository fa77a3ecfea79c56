"""Small event logs for tests of `vista prepare`, and prepared data read back as plain rows of original ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare
from vista.schema import SOURCES, SPLITS

START_S = 1_600_000_000  # 2020-09-13
SECOND_US = 1_000_000


def small_log(seed: int = 0, users: int = 8, items: int = 20, events: int = 160, seconds: int = 400) -> pl.DataFrame:
    """Random events in random order, some of them at equal times."""
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": random.integers(1, users + 1, events),
            "item_id": random.integers(100, 100 + items, events),
            "timestamp": START_S + random.integers(0, seconds, events),
            "action": random.choice(["view", "like", "buy"], events),
        }
    )


def write(frame: pl.DataFrame, path: Path) -> str:
    """Write a table as the suffix says; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)
    return str(path)


def prepared(folder: Path, events: pl.DataFrame, **options: Any) -> PreparedData:
    """The log prepared in a new folder below ``folder``; tables among the options are written first."""
    number = len(list(folder.iterdir()))
    tables = folder / f"tables{number}"
    options = {
        name: write(value, tables / f"{name}.parquet") if isinstance(value, pl.DataFrame) else value
        for name, value in options.items()
    }
    out = folder / f"data{number}"
    prepare(PrepareOptions(write(events, tables / "events.parquet"), **options), out)
    return PreparedData.open(out)


def histories_of(data: PreparedData) -> dict[Any, list[tuple[Any, Any, int]]]:
    """Per user id, the events as (item id, action, time in microseconds); action None where not given."""
    have, actions = data.histories, (None, *data.manifest.actions)
    rows = list(
        zip(
            data.catalogue.decode(have.item), (actions[a] for a in have.action.tolist()), have.timestamp_us.tolist(),
            strict=True,
        )
    )  # fmt: skip
    return {
        user: rows[have.offsets[place] : have.offsets[place + 1]] for place, user in enumerate(data.user_ids.tolist())
    }


@dataclass(frozen=True)
class Request:
    """One request; per candidate the item's id and index, its labels, source and context (None = not given)."""

    split: str
    user: Any
    time_us: int
    num_known: int
    items: tuple[Any, ...]
    indices: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    sources: tuple[str, ...]
    context: tuple[tuple[float | None, ...], ...]

    @property
    def positive(self) -> Any:
        """The item of a request made from events that came next."""
        (item,) = [item for item, source in zip(self.items, self.sources, strict=True) if source == "positive"]
        return item


def requests_of(data: PreparedData) -> list[Request]:
    """The requests of all splits, split by split."""
    requests = []
    for split in SPLITS:
        have = data.impressions(split)
        items, users = data.catalogue.decode(have.item), data.user_ids.tolist()
        context = [tuple(None if np.isnan(x) else x for x in row) for row in have.context.tolist()]
        labels = [tuple(row) for row in have.label.tolist()]
        sources = [SOURCES[source] for source in have.source]
        for row in range(have.num_requests):
            shown = slice(have.offsets[row], have.offsets[row + 1])
            requests.append(
                Request(
                    split, users[have.user[row]], int(have.timestamp_us[row]), int(have.num_known[row]),
                    tuple(items[shown]), tuple(have.item[shown].tolist()), tuple(labels[shown]), tuple(sources[shown]),
                    tuple(context[shown]),
                )
            )  # fmt: skip
    return requests
