"""Summaries as features of any model: exported summaries, joined to impressions without a look at the future.

    features = SummaryFeatures.open("SUMMARIES")
    joined = features.join(user_id, timestamp_us)
    for rows, batch in joined.batches(1024, seed=0):
        batch["tokens"]                          # (1024, K, D) float32, to torch with torch.from_numpy

Each impression gets the newest summary that was known at its time: the last of its user's with ``as_of`` not after it,
which means that every event in the summary happened strictly before. Where there is none, it gets the model's answer to
an empty history (cold start).

Shape letters: M summaries, K summary tokens, D width, C impressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vista.data.arrays import ArrayWriter, search_ranges
from vista.data.histories import PreparedData
from vista.data.requests import MomentColumns, places_of, read_moments
from vista.data.summaries import CODECS, COLD_START_FILE, TOKENS_FILE, ExportFacts, open_export
from vista.errors import ConfigError, DataError

NOT_KNOWN = -1  # an age that cannot be told
INDEX_COLUMNS = ("user_id", "as_of", "newest", "num_events", "span_us")


@dataclass(frozen=True)
class SummaryFeatures:
    """An export, opened. users: their distinct ids; first (users + 1,): where each one's summaries begin in the sorted
    arrays as_of_us, newest_us (-1: no event), num_events, span_us and place (its row in the files), (M,) int64 each.

    data: prepared data with the same users, to tell how many events a summary is behind; None: that is not told.
    """  # fmt: skip

    folder: Path
    facts: ExportFacts
    parts: tuple[Path, ...]
    users: pl.Series
    first: np.ndarray
    as_of_us: np.ndarray
    newest_us: np.ndarray
    num_events: np.ndarray
    span_us: np.ndarray
    place: np.ndarray
    data: PreparedData | None = None

    @classmethod
    def open(cls, folder: Path | str, data: PreparedData | None = None) -> SummaryFeatures:
        """Open what ``vista export`` wrote. Raises StaleOutput where that is not complete."""
        facts, parts = open_export(folder)
        table = pa.concat_tables(pq.read_table(path, columns=list(INDEX_COLUMNS)) for path in parts)
        user_id = pl.Series("id", table["user_id"])
        users = user_id.unique(maintain_order=True)
        user = places_of(user_id, users)
        as_of_us, newest_us = (table[name].cast(pa.int64()).fill_null(-1).to_numpy() for name in ("as_of", "newest"))
        num_events, span_us = (table[name].to_numpy() for name in ("num_events", "span_us"))
        order = np.lexsort((num_events, as_of_us, user))
        first = np.searchsorted(user[order], np.arange(len(users) + 1))
        as_of_us, newest_us, num_events, span_us = (c[order] for c in (as_of_us, newest_us, num_events, span_us))
        return cls(
            Path(folder), facts, tuple(parts), users, first, as_of_us, newest_us, num_events, span_us, order, data
        )

    def __len__(self) -> int:
        return len(self.place)

    def join(
        self,
        user_id: Sequence[Any] | np.ndarray | pl.Series,
        timestamp_us: np.ndarray,
        num_known: np.ndarray | None = None,
    ) -> JoinedSummaries:
        """The summaries for C impressions of these users at these times (microseconds since 1970 UTC).

        num_known (C,): events of the user strictly before each impression, for the age in events; default: counted in
        ``data`` where there is any. Raises ConfigError for columns of different lengths.
        """
        ids = user_id if isinstance(user_id, pl.Series) else pl.Series("id", user_id)
        timestamp_us = np.asarray(timestamp_us, np.int64)
        if len(ids) != len(timestamp_us) or (num_known is not None and len(num_known) != len(ids)):
            raise ConfigError(f"{len(ids)} users, {len(timestamp_us)} times: give one of each for every impression")
        user = places_of(ids, self.users)
        is_known = user >= 0
        first, end = self.first[np.where(is_known, user, 0)], self.first[np.where(is_known, user + 1, 0)]  # else none
        row = search_ranges(self.as_of_us, first, end, timestamp_us + 1) - 1
        row = np.where(row >= first, row, -1)
        if num_known is None and self.data is not None:
            num_known = known_before(self.data, ids, timestamp_us)
        return JoinedSummaries(self, row, timestamp_us, num_known)

    def join_table(
        self, path: Path | str, columns: MomentColumns | None = None
    ) -> tuple[pl.DataFrame, JoinedSummaries]:
        """As ``join``, for a Parquet or CSV table (file, folder or glob); also the table, in the same order."""
        frame, ids, timestamp_us = read_moments(path, columns or MomentColumns())
        return frame, self.join(ids, timestamp_us)

    @cached_property
    def cold_start(self) -> np.ndarray:
        """(K, D) float32: the tokens of a user without events."""
        return np.load(self.folder / COLD_START_FILE)

    @cached_property
    def tokens(self) -> np.ndarray:
        """(M, K, D) of the export's type, in the order of the files, memory-mapped; unpacked on first use."""
        path = self.folder / TOKENS_FILE
        shape = (len(self), self.facts.num_tokens, self.facts.width)
        if not path.exists():
            self._unpack(path, shape[1:])
        tokens = np.load(path, mmap_mode="r") if len(self) else np.load(path)
        if tokens.shape != shape or tokens.dtype != CODECS[self.facts.codec]:
            raise DataError(f"{path}: {tokens.dtype} {tokens.shape}, the export holds {shape}; remove that file")
        return tokens

    def _unpack(self, path: Path, shape: tuple[int, ...]) -> None:
        partial = path.with_name(path.name + ".partial")
        with ArrayWriter(partial, CODECS[self.facts.codec], shape) as writer:
            for part in self.parts:
                with pq.ParquetFile(part, memory_map=True) as file:
                    for group in range(file.num_row_groups):
                        column = file.read_row_group(group, columns=["tokens"])["tokens"]
                        for chunk in column.chunks:
                            writer.append(chunk.flatten().to_numpy().reshape(-1, *shape))
        partial.replace(path)


@dataclass(frozen=True)
class JoinedSummaries:
    """The summaries of C impressions. row (C,): place in the sorted arrays of ``features``, -1 for cold start."""

    features: SummaryFeatures
    row: np.ndarray
    timestamp_us: np.ndarray
    num_known: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: int | slice | np.ndarray) -> dict[str, np.ndarray]:
        """Some impressions: tokens (n, K, D) float32; is_known (n,) bool; num_events, span_us, age_us, age_events (n,).

        age_us: since the newest event in the summary; age_events: events of the user since; -1 where it is not known.
        One impression by its number has no first dimension.
        """
        row = self.row[chosen]
        is_known = row >= 0
        features = self.features
        place = features.place[row] if len(features) else np.zeros_like(row)
        tokens = np.empty((*np.shape(row), *features.cold_start.shape), np.float32)
        tokens[is_known] = features.tokens[place[is_known] if np.ndim(row) else place] if is_known.any() else 0
        tokens[~is_known] = features.cold_start
        num_events, span_us, newest_us = (
            np.where(is_known, column[row] if len(column) else 0, missing)
            for column, missing in ((features.num_events, 0), (features.span_us, 0), (features.newest_us, NOT_KNOWN))
        )
        age_us = np.where(newest_us >= 0, self.timestamp_us[chosen] - newest_us, NOT_KNOWN)
        age_events = (
            np.full(np.shape(row), NOT_KNOWN) if self.num_known is None else self.num_known[chosen] - num_events
        )
        return {"tokens": tokens, "is_known": is_known, "num_events": num_events, "span_us": span_us,
                "age_us": age_us, "age_events": age_events}  # fmt: skip

    def batches(
        self, size: int, seed: int | None = None, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Impressions ``size`` at a time: their rows, and what ``[rows]`` gives.

        rows: only these; default all. seed: in random order; None: in order.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        rows = rows if seed is None else np.random.default_rng(seed).permutation(rows)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            yield chosen, self[chosen]

    def staleness(self) -> dict[str, float]:
        """share_cold: impressions without a summary; of the others, median and 95th percentile of both ages.

        Ages in seconds (age_s_p50, age_s_p95), and where events are known in events (age_events_p50, age_events_p95).
        """
        row = self.row[self.row >= 0]
        found: dict[str, float] = {"share_cold": float((self.row < 0).mean()) if len(self.row) else 0.0}
        newest_us = self.features.newest_us[row]
        ages = {"age_s": (self.timestamp_us[self.row >= 0] - newest_us)[newest_us >= 0] / 1e6}
        if self.num_known is not None:
            ages["age_events"] = self.num_known[self.row >= 0] - self.features.num_events[row]
        for name, values in ages.items():
            for percent in (50, 95):
                found[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if len(values) else float("nan")
        return found


def known_before(data: PreparedData, ids: pl.Series, timestamp_us: np.ndarray) -> np.ndarray:
    """Events of each user strictly before each time, (C,) int64; 0 for users the data does not know."""
    return events_before(data, places_of(ids, data.user_ids), timestamp_us)


def events_before(data: PreparedData, user: np.ndarray, timestamp_us: np.ndarray) -> np.ndarray:
    """The same by user index, (C,) int64; -1 stands for a user that is not known."""
    offsets, place = np.asarray(data.histories.offsets, np.int64), np.maximum(user, 0)
    first = offsets[place]
    end = np.where(user >= 0, offsets[place + 1], first)
    return search_ranges(data.histories.timestamp_us, first, end, timestamp_us) - first
