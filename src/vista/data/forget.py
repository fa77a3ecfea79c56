"""Removing events from prepared data: which rows go, the changed files beside the old ones, and the swap.

A user's requests that come from what is removed go, too:

    of one item       the user's impressions of it
    before a moment   requests before it
    all               all of the user's requests
    always            negatives drawn from the user's own past that the user, without these events, had not met

A request made from events goes with its positive or its last negative, a given one with its last candidate. Of the
requests that stay, the number of events known before them falls. A user without events and requests
leaves the list of users, so that later users have other indices.

Files are changed in this order; a kill anywhere is harmless:

1. `write_changed`: every file that changes is written anew below DATA/forget.partial. Until 2, DATA is as it was.
2. `begin`: the journal DATA/forget.json. From now on nothing but this module reads DATA.
3. `swap`: each new file takes the place of the old one. What is still in forget.partial is still to be moved.
4. `end`: the journal goes.

Shape letters: U users, N events, R requests, M impressions.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.data.arrays import ArrayWriter, checksums, ragged_rows, read_shape, read_slice, save_array
from vista.data.histories import Histories, Impressions, PreparedData
from vista.data.tables import is_full_disk
from vista.errors import ConfigError, DataError
from vista.files import sync, write_durably
from vista.progress import Progress
from vista.schema import JOURNAL, SOURCES, SPLITS

PARTIAL = "forget.partial"  # folder of the changed files
ROWS_AT_ONCE = 1_000_000  # copied at a time
REQUEST_ARRAYS = ("user", "timestamp_us", "num_known")
IMPRESSION_ARRAYS = ("item", "label", "source", "context", "best_score")
Change = Callable[[np.ndarray, int], np.ndarray]  # (rows, number of the first) -> the rows with new values


@dataclass(frozen=True)
class Selection:
    """Whose events, and which of them: those of one item, those before a moment, or all. Ids are original ones."""

    users: tuple[Any, ...]
    item: Any = None
    before_us: int | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        if not self.users:
            raise ConfigError("no user: name at least one with --user")
        if (self.item is not None) + (self.before_us is not None) + self.everything != 1:
            raise ConfigError("which events: give exactly one of --item, --before and --all")

    def __str__(self) -> str:
        which = f"item {self.item}" if self.item is not None else f"before {self.before_us} us"
        return f"user {', '.join(map(str, self.users))}: {'all' if self.everything else which}"

    def item_index(self, data: PreparedData) -> int | None:
        """Of the item, where one is named. Raises DataError for one that the catalogue does not hold."""
        if self.item is None:
            return None
        index = int(data.catalogue.encode([self.item])[0])
        if index < data.catalogue.first_item:
            raise DataError(
                f"--item {self.item}: not in the catalogue of {data.folder}; its events share unknown bucket {index} "
                "with those of other items and cannot be told apart: use --before or --all, or remove them from the "
                "event log and prepare it again"
            )
        return index


@dataclass(frozen=True)
class SplitRemoval:
    """Of one split: rows of requests and impressions that go, and of requests that stay the new ``num_known``."""

    requests: np.ndarray
    impressions: np.ndarray
    known_rows: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Removal:
    """What goes, as sorted row numbers: events (n,), users (k,), and per split requests and impressions."""

    events: np.ndarray
    users: np.ndarray
    splits: dict[str, SplitRemoval]

    @property
    def num_requests(self) -> int:
        return sum(len(split.requests) for split in self.splits.values())

    @property
    def num_impressions(self) -> int:
        return sum(len(split.impressions) for split in self.splits.values())

    @property
    def is_empty(self) -> bool:
        return not (len(self.events) or len(self.users) or self.num_impressions)


def find_removal(data: PreparedData, selection: Selection) -> Removal:
    """What is to go. Users the data does not know have nothing there. Raises DataError where no event would be left."""
    item = selection.item_index(data)
    users = sorted({user for user_id in selection.users if (user := data.user_index(user_id)) is not None})
    log = data.histories
    events = {user: _selected_events(log, user, selection, item) for user in users}
    splits = {}
    for split in SPLITS:
        shown = data.impressions(split)
        parts = [_of_user(shown, user, _History.of(log, user, events[user]), selection, item) for user in users]
        splits[split] = _joined(parts)
    removal = Removal(_join(list(events.values())), _users_to_go(data, users, events, splits, selection), splits)
    if len(removal.events) and len(removal.events) == log.num_events:
        raise DataError(
            f"{data.folder}: no event would be left; remove the folder, and the store made from it, instead"
        )
    return removal


def _selected_events(log: Histories, user: int, selection: Selection, item: int | None) -> np.ndarray:
    """Rows of a user's events that go, (n,)."""
    first, end = (int(o) for o in log.offsets[user : user + 2])
    if selection.everything:
        return np.arange(first, end)
    if item is not None:
        return first + np.flatnonzero(log.item[first:end] == item)
    return first + np.flatnonzero(log.timestamp_us[first:end] < selection.before_us)


@dataclass(frozen=True)
class _History:
    """The items of one user's history, (n,), and the places in it of the events that go."""

    item: np.ndarray
    gone: np.ndarray

    @classmethod
    def of(cls, log: Histories, user: int, rows: np.ndarray) -> _History:
        first, end = (int(o) for o in log.offsets[user : user + 2])
        return cls(np.asarray(log.item[first:end]), rows - first)

    def has_met(self, item: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Whether an event that stays, among the first ``known``, is of the item; all (m,)."""
        left = np.delete(np.arange(len(self.item)), self.gone)
        met, first = np.unique(self.item[left], return_index=True)
        place = np.minimum(np.searchsorted(met, item), max(len(met) - 1, 0))
        return (met[place] == item) & (left[first[place]] < known) if len(met) else np.zeros(len(item), bool)


def _of_user(shown: Impressions, user: int, history: _History, selection: Selection, item: int | None) -> SplitRemoval:
    """What goes of one user's requests in a split."""
    first, end = shown.of_user(user)
    bounds = np.asarray(shown.offsets[first : end + 1], np.int64)
    known = np.asarray(shown.num_known[first:end])
    rows = slice(bounds[0], bounds[-1])
    own_past = np.asarray(shown.source[rows]) == SOURCES.index("history")
    is_gone = own_past & ~history.has_met(np.asarray(shown.item[rows]), np.repeat(known, np.diff(bounds)))
    if item is not None:
        is_gone |= np.asarray(shown.item[rows]) == item
    gone = _spoilt(np.asarray(shown.source[rows]), is_gone, bounds - bounds[0])
    if selection.everything:
        gone[:] = True
    elif selection.before_us is not None:
        gone |= np.asarray(shown.timestamp_us[first:end]) < selection.before_us
    whole = ragged_rows(bounds[:-1][gone], np.diff(bounds)[gone])
    fewer = known - np.searchsorted(history.gone, known)
    changed = ~gone & (fewer != known)
    return SplitRemoval(
        first + np.flatnonzero(gone), np.union1d(bounds[0] + np.flatnonzero(is_gone), whole),
        first + np.flatnonzero(changed), fewer[changed],
    )  # fmt: skip


def _spoilt(source: np.ndarray, is_gone: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Which requests cannot stay when some of their candidates go, (R,) bool. source, is_gone: (M,)."""
    positive = SOURCES.index("positive")
    request = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(request[chosen], minlength=len(offsets) - 1)

    is_made = count(source == positive) > 0
    left = count(~is_gone)
    return np.where(is_made, (count((source == positive) & ~is_gone) == 0) | (left < 2), left == 0)


def _users_to_go(
    data: PreparedData, users: list[int], events: dict[int, np.ndarray], splits: dict[str, SplitRemoval],
    selection: Selection,
) -> np.ndarray:  # fmt: skip
    """Users of whom neither an event nor a request is left, as `vista prepare` would not know them either, (k,)."""
    lengths = data.histories.lengths()
    left = {user: int(lengths[user]) - len(events[user]) for user in users}
    for name, split in splits.items():
        shown = data.impressions(name)
        for user in users:
            first, end = shown.of_user(user)
            left[user] += end - first - int(np.diff(np.searchsorted(split.requests, [first, end]))[0])
    return np.array([user for user in users if selection.everything or not left[user]], np.int64)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _joined(parts: Sequence[SplitRemoval]) -> SplitRemoval:
    """Of users in ascending order, so that rows stay sorted."""
    return SplitRemoval(*(_join([getattr(p, name) for p in parts]) for name in SplitRemoval.__dataclass_fields__))


# -- what is left, to compare with


def user_history(log: Histories, user: int | None) -> Histories:
    """The history of one user alone, in memory; None: of nobody."""
    first, end = (0, 0) if user is None else (int(o) for o in log.offsets[user : user + 2])
    columns = (np.array(column[first:end]) for column in (log.item, log.action, log.timestamp_us))
    return Histories(np.array([0, end - first]), *columns)


def without(history: Histories, selection: Selection, item: int | None) -> Histories:
    """A one-user history as if the selected events had never been in it."""
    keep = np.ones(history.num_events, bool)
    keep[_selected_events(history, 0, selection, item)] = False
    return Histories(
        np.array([0, int(keep.sum())]), history.item[keep], history.action[keep], history.timestamp_us[keep]
    )


def digest(history: Histories) -> str:
    """SHA-256 of a one-user history."""
    columns = (history.item.astype("<i4"), history.action.astype("<i2"), history.timestamp_us.astype("<i8"))
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


# -- step 1: the changed files


def write_changed(data: PreparedData, removal: Removal, quiet: bool = False) -> None:
    """Write every file that changes below DATA/forget.partial, the manifest too, and wait until they are on disk.

    Raises DataError on a full disk; whatever fails, nothing is left.
    """
    target = data.folder / PARTIAL
    shutil.rmtree(target, ignore_errors=True)
    if removal.is_empty:
        return
    try:
        _write_changed(data, removal, target, quiet)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if is_full_disk(error):
            raise DataError(
                f"{data.folder}: the disk is full; nothing was changed. Forgetting needs as much space again as the "
                "events and impressions take: free some, then run again"
            ) from error
        raise


def _write_changed(data: PreparedData, removal: Removal, target: Path, quiet: bool) -> None:
    target.mkdir()
    copies = _copies(data, removal)
    total = sum(read_shape(data.folder / name)[0][0] for name in copies)
    with Progress("forget: data", total=total, unit="rows", quiet=quiet) as progress:
        for name, (gone, change) in copies.items():
            copy_rows(data.folder / name, target / name, gone, change, progress)
    for folder, owners, rows in _ragged(removal):
        offsets = np.asarray(np.load(data.folder / folder / "offsets.npy"), np.int64)
        save_array(target / folder / "offsets.npy", offsets_without(offsets, owners, rows))
    if len(removal.users):
        users = pl.read_parquet(data.folder / "users.parquet")
        keep = np.delete(np.arange(len(users)), removal.users)
        users[keep].write_parquet(target / "users.parquet")
    written = [path for path in target.rglob("*") if path.is_file()]
    manifest = replace(
        data.manifest,
        statistics=data.manifest.statistics | _statistics(data, target),
        checksums=data.manifest.checksums | checksums(target, written),
    )
    manifest.save(target)
    for path in [target, *target.rglob("*")]:
        sync(path)
    sync(data.folder)


def _copies(data: PreparedData, removal: Removal) -> dict[str, tuple[np.ndarray, Change | None]]:
    """Arrays to copy, by path: which rows go, and which values change."""
    copies: dict[str, tuple[np.ndarray, Change | None]] = {}
    if len(removal.events):
        copies |= {f"events/{name}.npy": (removal.events, None) for name in ("item", "action", "timestamp_us")}
    for name, split in removal.splits.items():
        changes: dict[str, Change] = {}
        if len(removal.users):
            changes["user"] = partial(_renumber, removal.users)
        if len(split.known_rows):
            changes["num_known"] = partial(_replace_rows, split.known_rows, split.known)
        wanted = {array: (split.requests, changes.get(array)) for array in REQUEST_ARRAYS}
        if len(split.impressions):
            wanted |= dict.fromkeys(IMPRESSION_ARRAYS, (split.impressions, None))
        for array, (gone, change) in wanted.items():
            path = f"impressions/{name}/{array}.npy"
            if (len(gone) or change) and (data.folder / path).exists():  # best scores are not always known
                copies[path] = gone, change
    return copies


def _ragged(removal: Removal) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Folders whose offsets change, the owners (users, requests) and the rows that go there."""
    if len(removal.events) or len(removal.users):
        yield "events", removal.users, removal.events
    for name, split in removal.splits.items():
        if len(split.impressions):
            yield f"impressions/{name}", split.requests, split.impressions


def _renumber(gone: np.ndarray, users: np.ndarray, first: int) -> np.ndarray:
    return users - np.searchsorted(gone, users).astype(users.dtype)


def _replace_rows(rows: np.ndarray, values: np.ndarray, block: np.ndarray, first: int) -> np.ndarray:
    here = slice(*np.searchsorted(rows, [first, first + len(block)]))
    block[rows[here] - first] = values[here]
    return block


def copy_rows(source: Path, target: Path, gone: np.ndarray, change: Change | None, progress: Progress) -> None:
    """Copy an .npy file, a part at a time, but for some rows (sorted) and with changed values."""
    (length, *row_shape), dtype = read_shape(source)
    with ArrayWriter(target, dtype, tuple(row_shape)) as writer:
        for first in range(0, length, ROWS_AT_ONCE):
            end = min(first + ROWS_AT_ONCE, length)
            block = read_slice(source, first, end)
            block = block if change is None else change(block, first)
            here = gone[slice(*np.searchsorted(gone, [first, end]))]
            writer.append(np.delete(block, here - first, axis=0))
            progress.advance(end - first)


def offsets_without(offsets: np.ndarray, owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Offsets after some rows are gone, and the owners ``owners``, of whom no row is left."""
    of_row = np.searchsorted(offsets, rows, side="right") - 1
    lengths = np.diff(offsets) - np.bincount(of_row, minlength=len(offsets) - 1)
    return np.concatenate([[0], np.cumsum(np.delete(lengths, owners))]).astype(np.int64)


def _statistics(data: PreparedData, target: Path) -> dict[str, Any]:
    """The statistics of the manifest that change, as `vista prepare` counts them."""

    def path(name: str) -> Path:
        return target / name if (target / name).exists() else data.folder / name

    lengths = np.diff(np.load(path("events/offsets.npy")))
    first_us, last_us = _span(path("events/timestamp_us.npy"))
    offsets = {split: np.load(path(f"impressions/{split}/offsets.npy"), mmap_mode="r") for split in SPLITS}
    return {
        "num_users": len(lengths),
        "num_events": int(lengths.sum()),
        "longest_history": int(lengths.max()),
        "mean_history": round(float(lengths.mean()), 2),
        "median_history": float(np.median(lengths)),
        "first_timestamp_us": first_us,
        "last_timestamp_us": last_us,
        "num_requests": {split: len(o) - 1 for split, o in offsets.items()},
        "num_impressions": {split: int(o[-1]) for split, o in offsets.items()},
    }


def _span(path: Path) -> tuple[int, int]:
    """The smallest and the largest value of a file."""
    (length,), dtype = read_shape(path)
    low, high = np.iinfo(dtype).max, np.iinfo(dtype).min
    for first in range(0, length, ROWS_AT_ONCE):
        part = read_slice(path, first, min(first + ROWS_AT_ONCE, length))
        low, high = min(low, int(part.min())), max(high, int(part.max()))
    return low, high


# -- steps 2 to 4: the journal and the swap


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other `vista forget` works on this folder meanwhile; a killed one no longer does. Raises DataError else."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another vista forget works here; run this one when it has ended") from None
        yield
    finally:
        os.close(descriptor)


def pending(folder: Path) -> str | None:
    """The journal of a forgetting that was begun and not ended, None where there is none."""
    path = folder / JOURNAL
    return path.read_text() if path.exists() else None


def begin(folder: Path, journal: str) -> None:
    """From here on it is done, sooner or later."""
    write_durably(folder / JOURNAL, journal)


def swap(folder: Path) -> None:
    """Put the changed files in the places of the old ones, whichever are still to be moved."""
    partial_folder = folder / PARTIAL
    for path in sorted(p for p in partial_folder.rglob("*") if p.is_file()):
        path.replace(folder / path.relative_to(partial_folder))
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync(path)
    shutil.rmtree(partial_folder, ignore_errors=True)


def end(folder: Path) -> None:
    """Nothing is left to be done."""
    (folder / JOURNAL).unlink()
    sync(folder)
