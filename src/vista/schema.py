"""What prepared data is: the names, types and meaning of everything in a data folder. No code that reads or writes.

    DATA/
      manifest.json              a `Manifest`; written last, so a folder without it is not prepared data
      catalogue.safetensors      `vista.catalogue.Catalogue`
      users.parquet              column user_id; row number = user index
      events/                    all histories, one user after another, each in time order
        offsets.npy              (num_users + 1,) int64; the events of user u are offsets[u] : offsets[u + 1]
        item.npy                 (num_events,) int32 item index
        action.npy               (num_events,) int16 action index, 0 = not given
        timestamp_us.npy         (num_events,) int64 microseconds since 1970-01-01 UTC
      impressions/{train,validation,test}/      impressions, grouped in requests, sorted by (user, timestamp)
        user.npy                 (num_requests,) int32
        timestamp_us.npy         (num_requests,) int64
        num_known.npy            (num_requests,) int64: events of the user strictly before the request
        offsets.npy              (num_requests + 1,) int64; the candidates of request r are offsets[r] : offsets[r + 1]
        item.npy                 (num_impressions,) int32 item index of the candidate
        label.npy                (num_impressions, T) int8, 0 or 1 per task
        source.npy               (num_impressions,) int8, an index into SOURCES
        context.npy              (num_impressions, X) float32: numbers as they are, categories as hash buckets
        best_score.npy           (num_impressions, T) float32, only in synthetic worlds: the true probability
      forget.json                only while `vista forget` changes the folder; forget.partial/ beside it, new files

A *request* is one moment at which candidates were shown to one user; an *impression* is one candidate of a request.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vista.errors import DataError, StaleOutput

FORMAT_VERSION = 1
JOURNAL = "forget.json"  # in a data folder while `vista forget` changes it: nothing else may read it then
SPLITS = ("train", "validation", "test")
SOURCES = ("given", "positive", "popularity", "category", "history")  # where an impression's candidate came from
NUM_CONTEXT_BUCKETS = 1024  # values of a categorical context column are hashed into this many


@dataclass(frozen=True)
class ContextColumn:
    """One context column of the impressions. kind: ``number`` or ``category``; mean and std are of the train split."""

    name: str
    kind: str
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared data folder but the arrays themselves (``manifest.json``).

    statistics holds at least: num_users, num_events, num_items, num_events_cut (by max_history),
    num_duplicates_dropped, longest_history, mean_history, first_timestamp_us, last_timestamp_us, and num_requests /
    num_impressions per split. checksums: SHA-256 of each file, by path relative to the folder.
    """

    tasks: tuple[str, ...]
    actions: tuple[Any, ...]  # original values; action index a stands for actions[a - 1]
    context: tuple[ContextColumn, ...] = ()
    validation_from_us: int = 0  # requests at or after this moment are validation ...
    test_from_us: int = 0  # ... and at or after this one test
    statistics: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # how it was prepared: sources, columns, inferred units
    checksums: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of statistics and checksums: another one after every change of the data."""
        text = json.dumps([self.statistics, self.checksums], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` in one atomic step."""
        partial = folder / "manifest.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(folder / "manifest.json")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``. Raises DataError or StaleOutput, saying what to run."""
        if (folder / JOURNAL).exists():
            raise StaleOutput(
                f"{folder}: vista forget is at work here or was interrupted ({folder / JOURNAL}); run it again, with "
                "the same options: it completes what it began"
            )
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """As ``load``, also of a folder that is being changed."""
        path = folder / "manifest.json"
        if not path.exists():
            what = (
                "is not there" if not folder.exists() else "has no manifest.json: it is not (completely) prepared data"
            )
            raise StaleOutput(f"{folder} {what}; run: vista prepare EVENTS --out {folder}")
        try:
            values = json.loads(path.read_text())
            found = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a manifest ({error}); prepare the data again") from error
        if found != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {found}, this vista reads {FORMAT_VERSION}; prepare the data again"
            )
        values["context"] = tuple(ContextColumn(**column) for column in values["context"])
        return cls(**{**values, "tasks": tuple(values["tasks"]), "actions": tuple(values["actions"])})


def action_text(value: Any) -> str:
    """An action as text: one for 4 and 4.0, and for true and 1, whichever way a log or a request spells it."""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value)
