"""KuaiRand: short videos shown to users of Kuaishou in April and May 2022, with what came of each.

The one public log of long histories in which impressions are real: what was shown and not clicked is there, too. So
every row of the standard logs is an impression with its labels, and the history is what the user took up: rows that
were clicked (in a feed of one video at a time: played for seven seconds) or viewed long. Rows of the random log count
as history as well, where that log is there, but are no impressions: another policy chose them.

Read from the folder as published: ``log_standard_*.csv``, ``log_random_*.csv`` and ``video_features_basic_*.csv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import open_table, survey, write_dataset
from vista.data.tables import Table
from vista.errors import ConfigError, DataError, nearest

VARIANTS = ("1k", "27k", "pure")
TAKEN_UP = ("is_click", "long_view")  # what makes a row part of the history
# The strongest signal of a row is its event's action; the first that is 1.
ACTIONS = {"is_follow": "follow", "is_forward": "forward", "is_comment": "comment", "is_like": "like",
           "long_view": "long_view", "is_click": "click"}  # fmt: skip
TASKS = ("is_click", "long_view", "is_like")
KEYS = ("user_id", "video_id", "time_ms")
FIRST_MS, LAST_MS = (
    1_649_260_800_000,
    1_652_140_800_000,
)  # 2022-04-06 .. 2022-05-10, a day more than the log's on each side
VIDEO_COLUMNS = ("video_type", "music_type", "tag")
BUCKETS = 1 << 20  # of requests, of which a share is kept


@dataclass(frozen=True)
class KuairandOptions:
    """variant: which of the published versions the folder holds.

    max_impressions: at most about so many are kept, a uniform sample of the moments; 0: all. They are held in memory
    when they are prepared, events are not.
    """

    variant: str = "1k"
    max_impressions: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"--variant {self.variant!r}: unknown{nearest(self.variant, VARIANTS)}")
        if self.max_impressions < 0:
            raise ConfigError(f"--max-impressions {self.max_impressions}: at least 0, which keeps all")


def convert_kuairand(out: Path, source: Path, options: KuairandOptions | None = None) -> dict[str, Any]:
    """Convert a copy of KuaiRand into a new folder; what is in its dataset.json.

    source: the unpacked folder, or its folder ``data``. Raises DataError for a file that is missing or holds something
    else, naming file and row, and MissingColumn.
    """
    options = options or KuairandOptions()
    folder = source / "data" if (source / "data").is_dir() else source
    standard = _logs(folder, f"log_standard_*_{options.variant}*.csv")
    if not standard:
        raise DataError(
            f"{folder}: no log_standard_*_{options.variant}*.csv; give the unpacked folder of KuaiRand, and with "
            "--variant which one it is"
        )
    random = _logs(folder, f"log_random_*_{options.variant}.csv")
    videos = open_table(folder / f"video_features_basic_{options.variant}.csv", ("video_id",), VIDEO_COLUMNS)
    num_rows = sum(_check(table) for table in standard)
    for table in random:
        _check(table)
    tables: dict[str, pl.LazyFrame | pl.DataFrame] = {
        "events": pl.concat([_events(table) for table in (*standard, *random)]),
        "items": _items(videos),
        "impressions": pl.concat([_impressions(table, _share(num_rows, options)) for table in standard]),
    }
    described = {
        "source": source.resolve().name,
        "variant": options.variant,
        "max_impressions": options.max_impressions,
        "num_shown": num_rows,
        "logs": [table.path.name for table in (*standard, *random)],
    }
    return write_dataset(out, f"kuairand-{options.variant}", tables, described, (*standard, *random, videos))


def _logs(folder: Path, pattern: str) -> list[Table]:
    """In order of name, which is that of time."""
    return [open_table(path, (*KEYS, "tab", *ACTIONS)) for path in sorted(folder.glob(pattern))]


def _check(table: Table) -> int:
    """The number of rows. Raises DataError naming the row of an empty cell, or of a time that cannot be one."""
    rows, first, last = survey(table, (*KEYS, *ACTIONS), "time_ms")
    if rows and (first < FIRST_MS or last > LAST_MS):
        outside = (pl.col("time_ms") < FIRST_MS) | (pl.col("time_ms") > LAST_MS)
        table.refuse_where(
            outside, "time_ms", "is not in April or May 2022 in epoch milliseconds; is it the right file?"
        )
    return rows


def _events(table: Table) -> pl.LazyFrame:
    """The rows taken up, each with its strongest signal."""
    action = pl.coalesce(pl.when(pl.col(name) == 1).then(pl.lit(word)) for name, word in ACTIONS.items())
    taken_up = reduce(or_, (pl.col(name) == 1 for name in TAKEN_UP))
    return table.scan().filter(taken_up).select(*_keys(), action.alias("action"))


def _impressions(table: Table, share: float) -> pl.LazyFrame:
    """Every row with its labels and the tab it was shown in; or a share of the moments."""
    rows = table.scan()
    if share < 1:
        rows = rows.filter(pl.struct("user_id", "time_ms").hash(0) % BUCKETS < int(share * BUCKETS))
    labels = [pl.col(name).cast(pl.Int8) for name in TASKS]
    return rows.select(*_keys(), *labels, pl.concat_str(pl.lit("tab "), pl.col("tab")).alias("tab"))


def _share(num_rows: int, options: KuairandOptions) -> float:
    """Of the moments that are kept."""
    return min(options.max_impressions / max(num_rows, 1), 1.0) if options.max_impressions else 1.0


def _keys() -> list[pl.Expr]:
    return [pl.col("user_id").cast(pl.Int64), pl.col("video_id").cast(pl.Int64).alias("item_id"),
            pl.col("time_ms").cast(pl.Int64).alias("timestamp")]  # fmt: skip


def _items(videos: Table) -> pl.LazyFrame:
    """item_id, category (the first tag), and two more categorical features."""
    tag = pl.col("tag").cast(pl.String).str.split(",").list.first().str.strip_chars()
    others = [pl.col(name).cast(pl.String) for name in ("video_type", "music_type")]
    return videos.scan().select(pl.col("video_id").cast(pl.Int64).alias("item_id"), tag.alias("category"), *others)
