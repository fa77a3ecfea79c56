"""Requests: which are kept, which split each belongs to (by global time), and how they are written.

Shape letters: R requests, M impressions, T tasks, X context columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.catalogue import hash_ids
from vista.data.arrays import ragged_rows, save_array
from vista.errors import ConfigError
from vista.schema import SPLITS


@dataclass(frozen=True)
class SplitRules:
    """Shares of the requests, by time, that the last two splits get; or their first moments, where given."""

    validation_fraction: float
    test_fraction: float
    validation_from_us: int | None = None
    test_from_us: int | None = None

    def __post_init__(self) -> None:
        validation, test = self.validation_fraction, self.test_fraction
        if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
            raise ConfigError(
                f"validation fraction {validation}, test fraction {test}: each from 0, and together less than 1"
            )
        given = (self.validation_from_us, self.test_from_us)
        if None not in given and given[0] > given[1]:  # type: ignore[operator]
            raise ConfigError("--validation-from lies after --test-from; train, validation and test follow one another")


@dataclass(frozen=True)
class SplitTimes:
    """Requests at or after validation_from_us are validation, and at or after test_from_us test. Microseconds."""

    validation_from_us: int
    test_from_us: int

    @classmethod
    def choose(cls, timestamps_us: np.ndarray, rules: SplitRules) -> SplitTimes:
        """The moments that leave each split its share of the requests. Without requests everything is train."""
        if not len(timestamps_us):
            end = np.iinfo(np.int64).max
            given = (rules.validation_from_us, rules.test_from_us)
            return cls(*(end if moment is None else moment for moment in given))
        ordered = np.sort(timestamps_us)

        def moment(share: float) -> int:
            """The time of the request with that share of all at or after it; past the end for a share of 0."""
            place = len(ordered) - round(share * len(ordered))
            return int(ordered[place]) if place < len(ordered) else int(ordered[-1]) + 1

        test = moment(rules.test_fraction) if rules.test_from_us is None else rules.test_from_us
        validation = rules.validation_from_us
        if validation is None:
            validation = min(moment(rules.validation_fraction + rules.test_fraction), test)
        return cls(validation, max(test, validation))

    def of(self, timestamps_us: np.ndarray) -> np.ndarray:
        """The split of each request, an index into ``SPLITS``, (n,) int64."""
        return np.searchsorted([self.validation_from_us, self.test_from_us], timestamps_us, side="right")


@dataclass(frozen=True)
class RequestTable:
    """Requests sorted by (user, timestamp), with users and items as codes; see ``vista.schema`` for the arrays."""

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

    def take(self, rows: np.ndarray) -> RequestTable:
        """Some of the requests, with their impressions."""
        lengths = np.diff(self.offsets)[rows]
        shown = ragged_rows(self.offsets[rows], lengths)
        return RequestTable(
            self.user[rows], self.timestamp_us[rows], self.num_known[rows], np.concatenate([[0], np.cumsum(lengths)]),
            self.item[shown], self.label[shown], self.source[shown], self.context[shown],
            None if self.best_score is None else self.best_score[shown],
        )  # fmt: skip

    def save(self, folder: Path, user_index: np.ndarray, item_index: np.ndarray) -> None:
        """Write the arrays of one split; the two tables say what index each code has."""
        arrays = {
            "user": user_index[self.user].astype(np.int32),
            "timestamp_us": self.timestamp_us.astype(np.int64),
            "num_known": self.num_known.astype(np.int64),
            "offsets": self.offsets.astype(np.int64),
            "item": item_index[self.item].astype(np.int32),
            "label": self.label.astype(np.int8),
            "source": self.source.astype(np.int8),
            "context": self.context.astype(np.float32),
        }
        if self.best_score is not None:
            arrays["best_score"] = self.best_score.astype(np.float32)
        for name, array in arrays.items():
            save_array(folder / f"{name}.npy", array)


def save_splits(
    table: RequestTable, times: SplitTimes, folder: Path, user_index: np.ndarray, item_index: np.ndarray
) -> dict[str, dict[str, int]]:
    """Write all splits; numbers of requests and impressions of each, for the manifest."""
    split = times.of(table.timestamp_us)
    counts: dict[str, dict[str, int]] = {"num_requests": {}, "num_impressions": {}}
    for number, name in enumerate(SPLITS):
        part = table.take(np.flatnonzero(split == number))
        part.save(folder / name, user_index, item_index)
        counts["num_requests"][name], counts["num_impressions"][name] = part.num_requests, len(part.item)
    return counts


def mix(values: np.ndarray, salt: int) -> np.ndarray:
    """A pseudo-random 64-bit number for each uint64 value, another one for each salt.

    What is drawn for a request comes from the request alone: requests added later change no draw.
    """
    salted = int(hash_ids(np.array([salt % 2**64], np.uint64))[0])
    return hash_ids(values ^ np.uint64(salted))


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Hashes to float64 in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def request_keys(user_hash: np.ndarray, timestamp_us: np.ndarray, ordinal: np.ndarray | int = 0) -> np.ndarray:
    """A number for each request, from the user's id, the time, and which one it is among several at that time."""
    return hash_ids(hash_ids(user_hash ^ hash_ids(timestamp_us)) + np.asarray(ordinal, np.uint64))
