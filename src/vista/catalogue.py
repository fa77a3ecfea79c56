"""The catalogue: every item there is, and the one integer, the *item index*, that stands for it everywhere.

Item index space, the same in prepared data, batches, models, checkpoints, stores and servers:

    0                                padding, never an item
    1 .. num_unknown_buckets         an id the catalogue does not hold, by a hash of the id
    num_unknown_buckets + 1 ..       the items of the catalogue, in catalogue order

Exact identity and what a model may learn are kept apart: every catalogue item has an index of its own, but an item
first seen after the training period shares the *embedding row* of an unknown bucket, as it would have if it had been
unknown. So offline scores cannot be better than online ones, but for one thing: of two new items in one bucket, what
counts exactly (a sketch, "the same item") takes one for the other online, and tells them apart offline. Hence there are
many more buckets than rows.

Needs numpy and safetensors alone, so that a server can load it without any data tooling.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vista.errors import CheckpointError, DataError

INTEGER = re.compile("0|-?[1-9][0-9]{0,18}")  # of 64 bits or so, as Python prints it: "007" is another id than 7
DEFAULT_UNKNOWN_BUCKETS = 4096  # of a user's 40 new items, one in a hundred is taken for another
UNKNOWN_ROWS = 64  # that all buckets share: nothing is learned of an item that nobody had met


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each id, (n,) uint64: the same on every machine and in every version.

    Integers go through splitmix64, strings through BLAKE2b of their UTF-8 bytes.
    """
    if ids.dtype.kind in "iu":
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
    return np.array([_hash_id(key) for key in ids.tolist()], np.uint64)


def _hash_id(key: Any) -> int:
    if isinstance(key, str):
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return int(hash_ids(np.array([key & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))[0])


def id_array(ids: Sequence[Any] | np.ndarray, mixed: bool = False) -> np.ndarray:
    """Ids as int64 when they are all integers, else as an object array of strings.

    mixed: integers and strings may stand side by side, as in a request; they stay what they are. Raises DataError for
    a null or anything else that is neither, and for a mixture where none is allowed.
    """
    is_text = not isinstance(ids, np.ndarray) and any(isinstance(key, str) for key in ids)
    array = np.empty(len(ids), np.int64 if not len(ids) else object) if is_text or not len(ids) else np.asarray(ids)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    array = np.empty(len(ids), dtype=object)
    array[:] = list(ids)
    for position, value in enumerate(array):
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, str) or (mixed and is_integer)):
            rule = "an id is an integer or a string" if mixed else "ids are all integers or all strings"
            raise DataError(f"id {position} is {value!r} ({type(value).__name__}): {rule}")
    return array


@dataclass(frozen=True)
class Catalogue:
    """The items and their static features.

    ids             (V,) int64, or object array of str; unique
    embedding_row   (I,) int32 per item index, I = 1 + num_unknown_buckets + V: the row of the embedding table.
                    The first rows are shared (padding, unknown buckets, see ``unknown_rows``), each other one item's.
    features        (I, F) int32 per item index: categorical features, 0 = unknown
    feature_names   F names;  feature_sizes  F numbers of values, 0 included
    feature_values  F lists: the original value of each code from 1 on
    vectors         name -> (I, width) float32 per item index; zero where there is none
    """

    ids: np.ndarray
    embedding_row: np.ndarray
    num_unknown_buckets: int = UNKNOWN_ROWS
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    feature_names: tuple[str, ...] = ()
    feature_values: tuple[tuple[Any, ...], ...] = ()
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.embedding_row) == self.num_indices, (len(self.embedding_row), self.num_indices)
        if not self.feature_names:
            object.__setattr__(self, "features", np.zeros((self.num_indices, 0), np.int32))
        assert self.features.shape == (self.num_indices, len(self.feature_names))

    @property
    def num_items(self) -> int:
        return len(self.ids)

    @property
    def first_item(self) -> int:
        """The index of the catalogue's first item."""
        return 1 + self.num_unknown_buckets

    @property
    def num_indices(self) -> int:
        return self.first_item + self.num_items

    @property
    def num_rows(self) -> int:
        """Rows of the embedding table: padding, those of unknown buckets, and the items known in training."""
        return int(self.embedding_row.max(initial=0)) + 1

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        return tuple(len(values) + 1 for values in self.feature_values)

    def unknown_index(self, ids: np.ndarray) -> np.ndarray:
        """The bucket index of ids the catalogue does not hold, (n,) int32 in 1 .. num_unknown_buckets."""
        return (hash_ids(ids) % np.uint64(self.num_unknown_buckets)).astype(np.int32) + 1

    def encode(self, ids: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Ids to item indices, (n,) int32; an id that is not in the catalogue gets its unknown bucket."""
        wanted = _as_kind(id_array(ids, mixed=True), self.ids.dtype.kind)
        index = self._positions_of(wanted)
        return np.where(index >= 0, index + self.first_item, self.unknown_index(wanted)).astype(np.int32)

    def _positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Place of each id in ``self.ids``, (n,) int64, -1 where it is not there."""
        if ids.dtype.kind == "O" or self.ids.dtype.kind == "O":
            return np.array([self._positions.get(key, -1) for key in ids.tolist()], np.int64)
        if not self.num_items:
            return np.full(len(ids), -1, np.int64)
        order, ordered = self._sorted
        place = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        return np.where(ordered[place] == ids, order[place], -1)

    def decode(self, index: np.ndarray) -> list[Any]:
        """Item indices back to ids; None for padding and unknown buckets."""
        return [self.ids[i - self.first_item] if i >= self.first_item else None for i in np.asarray(index).tolist()]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.ids, kind="stable")
        return order, self.ids[order]

    @cached_property
    def _positions(self) -> dict[Any, int]:
        return {key: position for position, key in enumerate(self.ids.tolist())}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids, rows and features: two catalogues with one fingerprint are interchangeable for a model."""
        digest = hashlib.sha256()
        for array in (hash_ids(self.ids), self.embedding_row, self.features):
            digest.update(np.ascontiguousarray(array).tobytes())
        for name in sorted(self.vectors):
            digest.update(name.encode() + np.ascontiguousarray(self.vectors[name]).tobytes())
        digest.update(json.dumps([self.num_unknown_buckets, list(self.feature_names)]).encode())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        arrays = {"embedding_row": self.embedding_row, "features": self.features}
        if self.ids.dtype.kind == "i":
            arrays["ids"] = self.ids
        else:
            encoded = [text.encode() for text in self.ids]
            arrays["ids_utf8"] = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
            arrays["ids_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        arrays |= {f"vector.{name}": vectors for name, vectors in self.vectors.items()}
        header = {
            "num_unknown_buckets": self.num_unknown_buckets,
            "feature_names": self.feature_names,
            "feature_values": self.feature_values,
        }
        save_file(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()}, path, {"catalogue": json.dumps(header)}
        )

    @classmethod
    def load(cls, path: Path) -> Catalogue:
        """Read what ``save`` wrote. Raises CheckpointError when the file is missing or not a catalogue."""
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["catalogue"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable catalogue ({error}); prepare or train again") from error
        if "ids" in arrays:
            ids = arrays["ids"]
        else:
            text, offsets = arrays["ids_utf8"].tobytes(), arrays["ids_offsets"].tolist()
            ids = np.empty(len(offsets) - 1, dtype=object)
            ids[:] = [text[a:b].decode() for a, b in pairwise(offsets)]
        return cls(
            ids=ids,
            embedding_row=arrays["embedding_row"],
            num_unknown_buckets=header["num_unknown_buckets"],
            features=arrays["features"],
            feature_names=tuple(header["feature_names"]),
            feature_values=tuple(tuple(values) for values in header["feature_values"]),
            vectors={n.removeprefix("vector."): a for n, a in arrays.items() if n.startswith("vector.")},
        )


def unknown_rows(num_unknown_buckets: int) -> np.ndarray:
    """The embedding rows of padding and of the unknown buckets, (1 + num_unknown_buckets,) int32."""
    bucket = np.arange(num_unknown_buckets, dtype=np.int32)
    return np.concatenate([np.zeros(1, np.int32), 1 + bucket % UNKNOWN_ROWS])


def _as_kind(ids: np.ndarray, kind: str) -> np.ndarray:
    """Ids as the catalogue spells them: 7 as "7" for a catalogue of strings, "7" as 7 for one of integers.

    A command line or a URL has only strings. What cannot be spelled so ("abc", "007") stays as it is, and is unknown.
    """
    if ids.dtype.kind == kind == "i":
        return ids
    spelled = np.empty(len(ids), dtype=object)
    spelled[:] = [str(key) if kind == "O" else _as_integer(key) for key in ids.tolist()]
    return spelled


def _as_integer(key: Any) -> Any:
    return int(key) if isinstance(key, str) and INTEGER.fullmatch(key) else key
