"""Prepared data, opened: memory-mapped histories and impressions. Nothing is read until it is used.

Shape letters: U users, N events, T tasks, X context columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.catalogue import Catalogue
from vista.errors import DataError, StaleOutput
from vista.schema import SPLITS, Manifest


@dataclass(frozen=True)
class Histories:
    """All users' histories: offsets (U + 1,), and per event item, action and timestamp_us, each (N,)."""

    offsets: np.ndarray
    item: np.ndarray
    action: np.ndarray
    timestamp_us: np.ndarray

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    def lengths(self) -> np.ndarray:
        """Events per user, (U,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Impressions:
    """The impressions of one split, grouped in requests; see ``vista.schema`` for each array."""

    user: np.ndarray
    timestamp_us: np.ndarray
    num_known: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    label: np.ndarray
    source: np.ndarray
    context: np.ndarray
    best_score: np.ndarray | None = None

    @property
    def num_requests(self) -> int:
        return len(self.user)

    @property
    def num_impressions(self) -> int:
        return len(self.item)

    def of_user(self, user: int) -> tuple[int, int]:
        """The range of requests of one user (they are sorted by user, then time)."""
        first, end = np.searchsorted(self.user, [user, user + 1])
        return int(first), int(end)


@dataclass(frozen=True)
class PreparedData:
    """A prepared data folder. is_changing: it is opened by `vista forget` itself, which is about to change it."""

    folder: Path
    manifest: Manifest
    is_changing: bool = False

    @classmethod
    def open(cls, folder: Path | str) -> PreparedData:
        """Open a folder that ``vista prepare`` wrote. Raises DataError when it is not one."""
        folder = Path(folder)
        return cls(folder, Manifest.load(folder))

    @cached_property
    def histories(self) -> Histories:
        events = self.folder / "events"
        histories = Histories(*(self._map(events / f"{n}.npy") for n in ("offsets", "item", "action", "timestamp_us")))
        self._check_unchanged()
        if histories.num_events != len(histories.item):
            raise DataError(
                f"{events}: offsets end at {histories.num_events}, item.npy has {len(histories.item)}; prepare again"
            )
        return histories

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.load(self.folder / "catalogue.safetensors")

    @cached_property
    def user_ids(self) -> np.ndarray:
        """Original user ids by user index: (U,) int64, or object array of str."""
        user_ids = pl.read_parquet(self.folder / "users.parquet")["user_id"].to_numpy()
        self._check_unchanged()
        return user_ids

    @cached_property
    def _user_index(self) -> dict[Any, int]:
        return {str(user): index for index, user in enumerate(self.user_ids.tolist())}

    def user_index(self, user_id: Any) -> int | None:
        """The index of a user by original id (7 and "7" are the same user), or None."""
        return self._user_index.get(str(user_id))

    def history_of(self, user_id: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Item index, action and timestamp_us (N,) of one user's events, oldest first; None for an unknown user.

        Raises StaleOutput where files were changed since the folder was opened.
        """
        self._check_unchanged()
        index = self.user_index(user_id)
        if index is None:
            return None
        histories = self.histories
        own = slice(int(histories.offsets[index]), int(histories.offsets[index + 1]))
        return histories.item[own], histories.action[own], histories.timestamp_us[own]

    def impressions(self, split: str) -> Impressions:
        """The impressions of ``train``, ``validation`` or ``test``."""
        assert split in SPLITS, split
        folder = self.folder / "impressions" / split
        names = ("user", "timestamp_us", "num_known", "offsets", "item", "label", "source", "context")
        best = folder / "best_score.npy"
        impressions = Impressions(
            **{name: self._map(folder / f"{name}.npy") for name in names},
            best_score=self._map(best) if best.exists() else None,
        )
        self._check_unchanged()
        return impressions

    def _check_unchanged(self) -> None:
        """Raise StaleOutput where files were changed since the folder was opened: user indices would not agree."""
        now = Manifest.read(self.folder) if self.is_changing else Manifest.load(self.folder)
        if now != self.manifest:
            raise StaleOutput(f"{self.folder} was changed by vista forget since it was opened; start again")

    @staticmethod
    def _map(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r")
        except ValueError as error:  # an empty array cannot be mapped
            try:
                return np.load(path)
            except ValueError:
                raise DataError(f"{path}: not a readable array ({error}); prepare the data again") from error
        except OSError as error:
            raise DataError(f"{path}: not a readable array ({error}); prepare the data again") from error
