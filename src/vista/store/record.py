"""The stored record: one binary layout for summary tokens (hot) and for carried state (cold, exact).

Byte for byte it is specified in docs/record-format.md. In short: a fixed header, the user key, a table of named arrays,
their bytes, and a CRC-32 of all that. Only the array ``tokens`` is ever quantized, by the record's codec; every other
array is stored as it is.

Shape letters: B records, K summary tokens, D width.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from vista.errors import RecordError

MAGIC = b"VSTA"
FORMAT_VERSION = 1
KINDS = ("tokens", "state", "border", "position")
CODECS = ("float32", "float16", "bfloat16", "int8")
STORED_TYPES = dict(zip(CODECS, map(np.dtype, ("<f4", "<u2", "<u2", "|i1")), strict=True))  # of the tokens
LARGEST = dict(zip(CODECS, (3.4028235e38, 65504.0, 3.3895314e38, 3.4e38), strict=True))  # of a token's values
TOKENS = "tokens"  # the array that the codec applies to
SCALE = "tokens.scale"  # beside it with int8: (K,) float32

# magic, format version, kind, codec, arrays, bytes of the user key, events, as-of (us), model version, bytes of all
HEADER = struct.Struct("<4sHBBHHqq16sI")
ENTRY = struct.Struct("<24sBBxx4I")  # name, dtype, dimensions, shape (0 where there are fewer than 4)
CHECKSUM = struct.Struct("<I")
INTEGER = re.compile("0|-?[1-9][0-9]*")  # as Python prints it: "007" is another user than 7
DTYPES = tuple(np.dtype(name) for name in ("<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2"))
VERSION_BYTES = 16  # of every model version
LONGEST_KEY = 480  # bytes: a store prefixes it, and LMDB's keys end at 511
LONGEST_RECORD = 2**32 - 1  # bytes
FLOAT32_TINY = 2.0**-126  # the smallest normal number: int8 scales below it would lose their precision


@dataclass(frozen=True)
class Record:
    """One user's record of one model version.

    as_of_us: the timestamp of the newest event in it, microseconds since 1970 UTC, -1 for none; num_events: events in
    it; arrays: of one to four dimensions; ``tokens`` (K, D) float32 is subject to the codec.
    """

    kind: str
    version: str
    user_key: bytes
    as_of_us: int
    num_events: int
    arrays: dict[str, np.ndarray]


def user_key(user_id: Any) -> bytes:
    """The key of a user: ``i:7`` for an integer, ``s:anna`` for a string; a key beyond LONGEST_KEY is cut and hashed.

    "7" and 7 are the same user: a command line and a URL know strings only.
    """
    text = str(user_id)
    is_integer = INTEGER.fullmatch(text) is not None
    key = (b"i:" if is_integer else b"s:") + text.encode("utf-8", "surrogatepass")  # any string has a key
    if len(key) <= LONGEST_KEY:
        return key
    return b"h:" + key[: LONGEST_KEY - 2 - 64] + hashlib.sha256(key).hexdigest().encode()


class Stored(NamedTuple):
    """A ``Record`` that was read but not decoded: its tokens are as the codec wrote them. A tuple: cheap to make."""

    codec: str
    kind: str
    version: str
    user_key: bytes
    as_of_us: int
    num_events: int
    arrays: dict[str, np.ndarray]


def encode(record: Record, codec: str = "int8") -> bytes:
    """A record as bytes.

    Raises RecordError for an unknown codec or kind, for a version or user key of the wrong length, for an array that
    has no place in a record, and for tokens that are not finite or beyond what the codec can hold.
    """
    version = record.version.encode()
    if codec not in CODECS or record.kind not in KINDS:
        raise RecordError(f"codec {codec!r}, kind {record.kind!r}: known are {CODECS} and {KINDS}")
    if len(version) != VERSION_BYTES or len(record.user_key) > LONGEST_KEY:
        raise RecordError(
            f"model version {record.version!r} and a user key of {len(record.user_key)} bytes: a version has "
            f"{VERSION_BYTES} bytes, a key at most {LONGEST_KEY}; make it with user_key"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, array in record.arrays.items():
        arrays |= _quantize(array, codec) if name == TOKENS else {name: array}
    return repack(
        Stored(codec, record.kind, record.version, record.user_key, record.as_of_us, record.num_events, arrays)
    )


def repack(record: Stored) -> bytes:
    """The bytes of a record whose tokens are as its codec wrote them. Raises RecordError for an unknown array type."""
    arrays = record.arrays
    table, body = [], []
    for name, array in arrays.items():
        little = array.dtype.newbyteorder("<")
        if little not in DTYPES or not 1 <= array.ndim <= 4 or len(name.encode()) > 24:
            raise RecordError(f"array {name!r} of type {array.dtype} and shape {array.shape} cannot be stored")
        shape = (*array.shape, 0, 0, 0)[:4]
        table.append(ENTRY.pack(name.encode(), DTYPES.index(little), array.ndim, *shape))
        body.append(np.ascontiguousarray(array, little).tobytes())
    size = HEADER.size + len(record.user_key) + ENTRY.size * len(table) + sum(map(len, body)) + CHECKSUM.size
    if size > LONGEST_RECORD:
        raise RecordError(f"a record of {size} bytes: the longest has {LONGEST_RECORD}")
    header = HEADER.pack(
        MAGIC, FORMAT_VERSION, KINDS.index(record.kind), CODECS.index(record.codec), len(table), len(record.user_key),
        record.num_events, record.as_of_us, record.version.encode(), size,
    )  # fmt: skip
    content = b"".join([header, record.user_key, *table, *body])
    return content + CHECKSUM.pack(zlib.crc32(content))


def decode(blob: bytes, version: str | None = None) -> Record:
    """A record from bytes, tokens as float32. version: refuse records of any other model version.

    Raises RecordError, saying what is wrong: too short, not a record, another format, a wrong size or checksum, an
    unknown kind, codec or type, shapes that do not fill the record, tokens unlike their codec, another model version.
    """
    stored = unpack(blob, version)
    arrays = stored.arrays
    if TOKENS in arrays:
        rest = {name: array for name, array in arrays.items() if name not in (TOKENS, SCALE)}
        arrays = {TOKENS: decode_tokens([stored])[0], **rest}
    return Record(stored.kind, stored.version, stored.user_key, stored.as_of_us, stored.num_events, arrays)


def decode_tokens(stored: Sequence[Stored], out: np.ndarray | None = None) -> np.ndarray:
    """The tokens of B records of one shape and codec, (B, K, D) float32, all at once. out: write them there.

    out is contiguous. Raises RecordError for records that cannot be decoded together.
    """
    if any(TOKENS not in one.arrays for one in stored):
        raise RecordError(f"no tokens in a record of kind {', '.join(sorted({one.kind for one in stored}))}")
    shapes = {(one.codec, one.arrays[TOKENS].shape) for one in stored}
    if len(shapes) > 1:
        raise RecordError(f"records of different codecs or shapes cannot be decoded together: {sorted(shapes)}")
    if not stored:
        return np.zeros((0, 0, 0), np.float32) if out is None else out
    ((codec, (num_tokens, width)),) = shapes
    out = np.empty((len(stored), num_tokens, width), np.float32) if out is None else out
    _dequantize([one.arrays for one in stored], codec, out)
    return out


def unpack(blob: bytes, version: str | None = None) -> Stored:
    """A record from bytes, its tokens as stored. The arrays are views of the bytes. Raises as ``decode``."""
    if len(blob) < HEADER.size + CHECKSUM.size:
        raise RecordError(f"truncated: {len(blob)} bytes, a header alone has {HEADER.size}")
    magic, found, kind, codec, num_arrays, key_bytes, num_events, as_of_us, written_by, size = HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise RecordError(f"not a record: starts with {magic!r}, not {MAGIC!r}")
    if not 1 <= found <= FORMAT_VERSION:
        raise RecordError(f"format version {found}: this vista reads 1 to {FORMAT_VERSION}; update it")
    if size != len(blob):
        raise RecordError(f"truncated or overlong: {len(blob)} bytes where the header says {size}")
    if CHECKSUM.unpack_from(blob, size - CHECKSUM.size)[0] != zlib.crc32(memoryview(blob)[: -CHECKSUM.size]):
        raise RecordError("checksum mismatch: the record was damaged after it was written; summarize the user again")
    if kind >= len(KINDS) or codec >= len(CODECS):
        raise RecordError(f"unknown kind {kind} or codec {codec}")
    own_version = written_by.decode(errors="replace")
    if version is not None and own_version != version:
        raise RecordError(f"belongs to model version {own_version}, not {version}")
    place = HEADER.size + key_bytes
    body = place + ENTRY.size * num_arrays
    layout = _layout(bytes(blob[place:body]), num_arrays, size - CHECKSUM.size - body, CODECS[codec])
    arrays = {name: np.ndarray(shape, dtype, blob, body + start) for name, dtype, start, shape in layout}
    key = bytes(blob[HEADER.size : place])
    return Stored(CODECS[codec], KINDS[kind], own_version, key, as_of_us, num_events, arrays)


@lru_cache(maxsize=4096)  # the records of a version have few layouts: as many as recent events can be, and one more
def _layout(
    table: bytes, num_arrays: int, body_bytes: int, codec: str
) -> list[tuple[str, np.dtype, int, tuple[int, ...]]]:
    """Name, type, place in the body and shape of each array of a table. Raises RecordError."""
    if body_bytes < 0:
        raise RecordError("the user key or the table of arrays reaches beyond the record")
    layout, place = [], 0
    for entry in range(num_arrays):
        name, dtype, ndim, *sizes = ENTRY.unpack_from(table, ENTRY.size * entry)
        if dtype >= len(DTYPES) or not 1 <= ndim <= 4:
            raise RecordError(f"array {entry} has unknown type {dtype} or {ndim} dimensions")
        shape = tuple(sizes[:ndim])
        end = place + math.prod(shape) * DTYPES[dtype].itemsize  # of Python's integers: numpy's would wrap around
        if end > body_bytes:
            raise RecordError(f"array {entry} of shape {shape} reaches beyond the record")
        layout.append((name.rstrip(b"\0").decode(errors="replace"), DTYPES[dtype], place, shape))
        place = end
    if place != body_bytes:
        raise RecordError(f"{body_bytes - place} bytes belong to no array")
    _check_tokens({name: (dtype, shape) for name, dtype, _, shape in layout}, codec)
    return layout


def _check_tokens(arrays: dict[str, tuple[np.dtype, tuple[int, ...]]], codec: str) -> None:
    """Raise RecordError for tokens that are not (K, D) of the codec's type, with (K,) scales where it has them."""
    if TOKENS not in arrays:
        return
    dtype, shape = arrays[TOKENS]
    is_scaled = arrays.get(SCALE) == (np.dtype("<f4"), shape[:1])
    if len(shape) != 2 or dtype != STORED_TYPES[codec] or is_scaled != (codec == "int8"):
        raise RecordError(f"tokens of type {dtype} and shape {shape} are not what codec {codec} writes")


def _quantize(tokens: np.ndarray, codec: str) -> dict[str, np.ndarray]:
    """tokens (K, D) as stored. int8: one scale per token, so that a large token does not cost the others precision."""
    if tokens.ndim != 2 or tokens.dtype != np.float32:
        raise RecordError(f"tokens of type {tokens.dtype} and shape {tokens.shape}: they are (K, D) float32")
    if not np.isfinite(tokens).all():
        raise RecordError("tokens hold a value that is not finite: the model has diverged; train it again")
    largest = float(np.abs(tokens).max(initial=0.0))
    if largest > LARGEST[codec]:
        raise RecordError(f"tokens reach {largest:.6g}, codec {codec} ends at {LARGEST[codec]:.6g}; use float32")
    match codec:
        case "float32":
            return {TOKENS: tokens.astype("<f4")}
        case "float16":
            return {TOKENS: tokens.astype("<f2").view("<u2")}
        case "bfloat16":
            bits = tokens.astype("<f4").view("<u4")
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
            return {TOKENS: (rounded >> 16).astype("<u2")}
        case _:
            scale = np.maximum(np.abs(tokens).max(axis=1, initial=0.0) / 127, FLOAT32_TINY).astype("<f4")
            return {TOKENS: np.rint(tokens / scale[:, None]).astype("i1"), SCALE: scale}


def _dequantize(stored: Sequence[Mapping[str, np.ndarray]], codec: str, out: np.ndarray) -> None:
    """The reverse for B records, written to ``out`` (B, K, D): joined and converted in one pass, no copy between."""
    assert out.flags.c_contiguous, "reshaping it below would make a copy"
    tokens = [arrays[TOKENS] for arrays in stored]
    rows = out.reshape(out.shape[0] * out.shape[1], out.shape[2])
    match codec:
        case "float32":
            np.concatenate(tokens, out=rows)
        case "float16":
            np.concatenate([array.view("<f2") for array in tokens], out=rows)
        case "bfloat16":
            bits = rows.view("<u4")
            np.concatenate(tokens, out=bits)
            bits <<= 16
        case _:
            np.concatenate(tokens, out=rows)
            scale = np.concatenate([arrays[SCALE] for arrays in stored])
            import torch  # here: only who decodes waits for it. Its product with a column takes 2/3 of numpy's time

            torch.from_numpy(rows).mul_(torch.from_numpy(scale)[:, None])


def error_bound(tokens: np.ndarray, codec: str) -> np.ndarray:
    """The largest error of each value after a round trip, (K, D): half a step of the codec."""
    size = np.abs(tokens)
    match codec:
        case "float32":
            return np.zeros_like(size)
        case "float16":
            return np.maximum(size * 2.0**-11, 2.0**-25)  # the second: below the smallest normal number
        case "bfloat16":
            return np.maximum(size * 2.0**-8, 2.0**-134)
        case _:
            step = np.maximum(size.max(axis=1, keepdims=True, initial=0.0) / 127, FLOAT32_TINY)
            return np.broadcast_to(step * 0.5001, size.shape)  # a ten-thousandth more: float32 rounds on the way
