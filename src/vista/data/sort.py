"""Event log -> histories, out of core: partition by user, sort each partition in memory, tidy it, append it.

Users and items are *codes* here: places in the sorted lists of ids. What prepared data calls an item index is known
only once the split is, see ``vista.data.prepare``.

Shape letters: U users, V items, N events.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.data.arrays import ArrayWriter, chunk_bounds, read_slice
from vista.data.events import EventLog, Survey, explained
from vista.progress import Progress

CHUNK_EVENTS = 4_000_000  # events of one chunk in a pass over all histories: about 100 MB of arrays
NO_TIME = np.iinfo(np.int64).max


@dataclass(frozen=True)
class HistoryRules:
    """Which events of the log a history holds. max_burst None: bursts of any size."""

    max_history: int
    min_user_events: int
    max_burst: int | None
    keep_duplicates: bool
    events_per_partition: int


@dataclass
class Cuts:
    """How many events and users the rules left out, each event counted once, in this order."""

    duplicates: int = 0
    burst_events: int = 0
    short_users: int = 0
    short_user_events: int = 0
    long_users: int = 0
    long_user_events: int = 0


@dataclass(frozen=True)
class Chunk:
    """The histories of users first_user .. end_user - 1; item, timestamp_us and is_burst_start are (n,).

    offsets: (users + 1,) int64 within the chunk. first_event: place of the chunk's first event in the whole.
    """

    first_user: int
    end_user: int
    first_event: int
    offsets: np.ndarray
    item: np.ndarray
    timestamp_us: np.ndarray
    is_burst_start: np.ndarray


@dataclass
class SortedLog:
    """All histories on disk, by user code, in time order. lengths: (U,) int64 events per user."""

    item_path: Path
    timestamp_path: Path
    burst_path: Path
    lengths: np.ndarray
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def num_events(self) -> int:
        return int(self.lengths.sum())

    def chunks(self, target: int = CHUNK_EVENTS) -> Iterator[Chunk]:
        """All histories, some users at a time."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        for first, end in chunk_bounds(self.lengths, target):
            a, b = int(offsets[first]), int(offsets[end])
            yield Chunk(
                first, end, a, offsets[first : end + 1] - a, read_slice(self.item_path, a, b),
                read_slice(self.timestamp_path, a, b), read_slice(self.burst_path, a, b).view(bool),
            )  # fmt: skip

    def first_seen_us(self, num_items: int) -> np.ndarray:
        """When anyone first met each item, (V,) int64; ``NO_TIME`` for an item in no history."""
        first = np.full(num_items, NO_TIME, np.int64)
        for chunk in self.chunks():
            np.minimum.at(first, chunk.item, chunk.timestamp_us)
        return first

    def item_counts(self, num_items: int, before_us: int) -> np.ndarray:
        """Events per item strictly before a time, (V,) int64."""
        counts = np.zeros(num_items, np.int64)
        for chunk in self.chunks():
            counts += np.bincount(chunk.item[chunk.timestamp_us < before_us], minlength=num_items)
        return counts


def sort_log(log: EventLog, survey: Survey, vocabulary: Vocabulary, rules: HistoryRules, places: Places) -> SortedLog:
    """Sort the whole log into histories. places.scratch is used and emptied of its partitions again."""
    partitions = places.scratch / "partitions"
    num_partitions = _partition(log, survey, vocabulary, rules.events_per_partition, partitions)
    sorted_log = SortedLog(
        places.scratch / "item_code.npy", places.events / "timestamp_us.npy", places.scratch / "is_burst_start.npy",
        np.zeros(len(vocabulary.users), np.int64),
    )  # fmt: skip
    with (
        ArrayWriter(sorted_log.item_path, np.int32) as item,
        ArrayWriter(places.events / "action.npy", np.int16) as action,
        ArrayWriter(sorted_log.timestamp_path, np.int64) as timestamp,
        ArrayWriter(sorted_log.burst_path, np.uint8) as burst,
        Progress("prepare: sort", total=survey.num_events, unit="events") as progress,
    ):
        for number in range(num_partitions):
            folder = partitions / f"part={number}"
            frame = _sort(pl.read_parquet(sorted(folder.iterdir()), glob=False))
            progress.advance(len(frame))
            frame = _tidy(frame, rules, sorted_log)
            item.append(frame["item"].to_numpy())
            action.append(frame["action"].to_numpy() if log.has_actions else np.zeros(len(frame), np.int16))
            timestamp.append(frame["ticks"].to_numpy() * log.clock.tick_us)
            burst.append(frame["is_start"].to_numpy())
            shutil.rmtree(folder)
    return sorted_log


@dataclass(frozen=True)
class Vocabulary:
    """All user ids and all item ids, each sorted; the place of an id is its code. The action index of each action."""

    users: pl.Series
    items: pl.Series
    action_index: dict[Any, int]

    @classmethod
    def union(cls, users: list[pl.Series], items: list[pl.Series], action_index: dict[Any, int]) -> Vocabulary:
        """The ids of several tables, of one type each, together."""
        return cls(pl.concat(users).unique().sort(), pl.concat(items).unique().sort(), action_index)

    def user_codes(self, ids: pl.Series) -> np.ndarray:
        """Codes of ids that are all there, (n,) int32."""
        return _codes(self.users, ids)

    def item_codes(self, ids: pl.Series) -> np.ndarray:
        """Codes of ids that are all there, (n,) int32."""
        return _codes(self.items, ids)


def _codes(known: pl.Series, ids: pl.Series) -> np.ndarray:
    table = pl.DataFrame({"id": known, "code": np.arange(len(known), dtype=np.int32)})
    return ids.to_frame("id").join(table, on="id", how="left", maintain_order="left")["code"].to_numpy()


@dataclass(frozen=True)
class Places:
    """Folders: events for what stays, scratch for what does not."""

    events: Path
    scratch: Path


def _partition(log: EventLog, survey: Survey, vocabulary: Vocabulary, target: int, folder: Path) -> int:
    """Write the log as codes, one folder per range of users with about ``target`` events; how many there are."""
    users = survey.users.with_columns(
        pl.Series("user", vocabulary.user_codes(survey.users["user_id"])),
        ((pl.col("num_events").cum_sum() - 1) // target).rank("dense").cast(pl.Int32).alias("part") - 1,
    )  # fmt: skip
    users = users.select("user_id", "user", "part")
    items = survey.items.with_columns(pl.Series("item", vocabulary.item_codes(survey.items["item_id"])))
    columns = [pl.col(name) for name in ("part", "user", "item", "ticks")]
    if log.has_actions:
        values = pl.Series(list(vocabulary.action_index), dtype=log.action_type)
        indices = pl.Series(list(vocabulary.action_index.values()), dtype=pl.Int16)
        columns.append(pl.col("action").replace_strict(values, indices, default=0, return_dtype=pl.Int16))
    columns += [pl.col(name) for name in ("burst", "event_id") if getattr(log.columns, name) is not None]
    with explained(log.tables, log.columns):
        # joined batch by batch: a join that keeps the order of a whole log keeps most of it in memory, too
        batches = log.lazy().collect_batches(
            chunk_size=CHUNK_EVENTS, maintain_order=True, lazy=True, engine="streaming"
        )
        for number, batch in enumerate(batches):
            coded = batch.join(users, on="user_id", how="left", maintain_order="left")
            coded = coded.join(items, on="item_id", how="left", maintain_order="left").select(columns)
            for (part,), events in coded.partition_by("part", include_key=False, as_dict=True).items():
                path = folder / f"part={part}" / f"{number:08}.parquet"
                events.write_parquet(path, compression="lz4", statistics=False, mkdir=True)
    return int(users["part"].max()) + 1  # type: ignore[arg-type]


def _sort(frame: pl.DataFrame) -> pl.DataFrame:
    """By user, then time; what is equal keeps input order. One packed key, where it fits, sorts four times as fast."""
    first_user, last_user = int(frame["user"].min()), int(frame["user"].max())  # type: ignore[arg-type]
    first, last = int(frame["ticks"].min()), int(frame["ticks"].max())  # type: ignore[arg-type]
    span = last - first + 1
    if (last_user - first_user + 1) * span >= 2**63:
        return frame.sort("user", "ticks", maintain_order=True)
    key = (pl.col("user").cast(pl.Int64) - first_user) * span + (pl.col("ticks") - first)
    return frame.with_columns(key.alias("key")).sort("key", maintain_order=True).drop("key")


def _tidy(frame: pl.DataFrame, rules: HistoryRules, log: SortedLog) -> pl.DataFrame:
    """Apply the rules to whole, sorted histories and count what they leave out; adds the column is_start."""
    cuts, before = log.cuts, len(frame)
    if not rules.keep_duplicates:
        frame = frame.filter(~_is_duplicate(frame))
    cuts.duplicates += before - len(frame)
    frame = frame.with_columns(pl.Series("is_start", _burst_starts(frame)))
    if rules.max_burst is not None:
        before = len(frame)
        burst = np.cumsum(frame["is_start"].to_numpy()) - 1
        frame = frame.filter(np.bincount(burst)[burst] <= rules.max_burst) if before else frame
        cuts.burst_events += before - len(frame)
    if not len(frame):
        return frame
    first_user = int(frame["user"][0])
    lengths = np.bincount(frame["user"].to_numpy() - first_user)
    frame, lengths = _drop_short(frame, lengths, rules.min_user_events, cuts)
    frame, lengths = _keep_newest(frame, lengths, rules.max_history, cuts)
    log.lengths[first_user : first_user + len(lengths)] = lengths
    return frame


def _is_duplicate(frame: pl.DataFrame) -> np.ndarray:
    """(n,) bool: an event that repeats an earlier one of the same user.

    With an event id: the same id. Without: the same item, time and action. Null event ids repeat nothing.
    """
    if "event_id" in frame.columns:
        first = frame.select(pl.struct("user", "event_id").is_first_distinct() | pl.col("event_id").is_null())
        return ~first.to_series().to_numpy()
    # only events at the same time as their neighbour can be equal, and those are few: hash no others
    same = _same_as_before(frame, "user") & _same_as_before(frame, "ticks")
    tied = np.flatnonzero(same | np.append(same[1:], False))
    names = [name for name in ("user", "ticks", "item", "action") if name in frame.columns]
    duplicate = np.zeros(len(frame), bool)
    duplicate[tied] = ~frame[tied].select(pl.struct(names).is_first_distinct()).to_series().to_numpy()
    return duplicate


def _same_as_before(frame: pl.DataFrame, column: str) -> np.ndarray:
    """(n,) bool: whether the value equals the one in the row before; null equals nothing."""
    return frame.select((pl.col(column) == pl.col(column).shift()).fill_null(False)).to_series().to_numpy()


def _burst_starts(frame: pl.DataFrame) -> np.ndarray:
    """(n,) bool: the first event of a burst, by the burst column where there is one, else by equal time."""
    return ~(_same_as_before(frame, "user") & _same_as_before(frame, "burst" if "burst" in frame.columns else "ticks"))


def _drop_short(
    frame: pl.DataFrame, lengths: np.ndarray, min_events: int, cuts: Cuts
) -> tuple[pl.DataFrame, np.ndarray]:
    """Leave out users with fewer than ``min_events`` events."""
    short = (lengths > 0) & (lengths < min_events)
    if short.any():
        cuts.short_users += int(short.sum())
        cuts.short_user_events += int(lengths[short].sum())
        frame = frame.filter(np.repeat(~short, lengths))
        lengths = np.where(short, 0, lengths)
    return frame, lengths


def _keep_newest(
    frame: pl.DataFrame, lengths: np.ndarray, max_history: int, cuts: Cuts
) -> tuple[pl.DataFrame, np.ndarray]:
    """Leave out all but the newest ``max_history`` events of a user."""
    cut = np.maximum(lengths - max_history, 0)
    if cut.any():
        cuts.long_users += int((cut > 0).sum())
        cuts.long_user_events += int(cut.sum())
        place = np.arange(len(frame)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        frame = frame.filter(place >= np.repeat(cut, lengths))
        lengths = lengths - cut
    return frame, lengths
