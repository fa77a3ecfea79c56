"""Taobao UserBehavior: what a million people clicked, put into the cart, marked and bought in nine days of 2017.

Read from ``UserBehavior.csv`` as published, which has no header: user, item, category, behaviour, epoch seconds. Some
of its times lie outside the nine days, by years; such rows are left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import open_table, readable_rows, survey, write_dataset
from vista.data.tables import Table
from vista.errors import ConfigError, DataError, nearest

FILE = "UserBehavior.csv"
NUMBERS = ("user_id", "item_id", "category", "timestamp")
COLUMNS = ("user_id", "item_id", "category", "action", "timestamp")
BEHAVIOURS = ("pv", "buy", "cart", "fav")  # page view, that is click; purchase; into the cart; marked
FIRST_S, END_S = 1_511_539_200, 1_512_316_800  # 2017-11-25 to 2017-12-03, whole days in China
MOST_OUTSIDE = 0.5  # share of rows; the published file has far less, so more is another unit or file


@dataclass(frozen=True)
class TaobaoOptions:
    """actions: the behaviours kept as events, separated by commas."""

    actions: str = ",".join(BEHAVIOURS)

    def __post_init__(self) -> None:
        for name in self.kept or [""]:
            if name not in BEHAVIOURS:
                raise ConfigError(f"--actions {self.actions!r}: unknown behaviour {name!r}{nearest(name, BEHAVIOURS)}")

    @property
    def kept(self) -> list[str]:
        return [name.strip() for name in self.actions.split(",") if name.strip()]


def convert_taobao(out: Path, source: Path, options: TaobaoOptions | None = None) -> dict[str, Any]:
    """Convert a copy into a new folder; what is in its dataset.json.

    source: the folder that holds UserBehavior.csv. Raises DataError for a file that is missing or holds something else,
    naming its row.
    """
    options = options or TaobaoOptions()
    if not (source / FILE).is_file():
        raise DataError(f"{source}: no {FILE}; unpack the published archive, and give the folder it is in")
    table = open_table(source / FILE, NUMBERS, header=COLUMNS)
    num_rows, _, _ = survey(table, COLUMNS, "timestamp")
    table.refuse_where(~pl.col("action").is_in(BEHAVIOURS), "action", f"is none of {', '.join(BEHAVIOURS)}")
    num_outside = _count_outside(table)
    if num_outside > MOST_OUTSIDE * num_rows:
        table.refuse_where(
            ~_is_inside(), "timestamp",
            f"is not in the nine days of the log (epoch seconds {FIRST_S} .. {END_S - 1}), nor are most others; is it "
            "the right file, in seconds?",
        )  # fmt: skip
    kept = table.scan().filter(_is_inside() & pl.col("action").is_in(options.kept))
    items = kept.group_by("item_id").agg(pl.col("category").min()).sort("item_id")
    tables: dict[str, pl.LazyFrame | pl.DataFrame] = {
        "events": kept.select("user_id", "item_id", "timestamp", "action"),
        "items": items,
    }
    described = {"source": source.resolve().name, "actions": options.kept, "num_outside_period": num_outside}
    return write_dataset(out, "taobao", tables, described, [table])


def _is_inside() -> pl.Expr:
    return pl.col("timestamp").is_between(FIRST_S, END_S, closed="left")


def _count_outside(table: Table) -> int:
    with readable_rows([table]):
        return int(table.scan().select((~_is_inside()).sum()).collect(engine="streaming").item())
