"""The stored record: one binary layout for summary tokens (hot) and for carried state (cold, exact).

Byte for byte it is specified in docs/record-format.md. In short: a fixed header, the user key, a table of named arrays,
their bytes, and a CRC-32 of all that. Only the array ``tokens`` is ever quantized, by the record's codec; every other
array is stored as it is.

Shape letters: B records, K summary tokens, D width.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.errors import RecordError

MAGIC = b"VSTA"
FORMAT_VERSION = 1
KINDS = ("tokens", "state", "border")
CODECS = ("float32", "float16", "bfloat16", "int8")
TOKENS = "tokens"  # the array that the codec applies to
SCALE = "tokens.scale"  # beside it with int8: (K,) float32

# magic, format version, kind, codec, arrays, bytes of the user key, events, as-of (us), model version, bytes of all
HEADER = struct.Struct("<4sHBBHHqq16sI")
ENTRY = struct.Struct("<24sBBxx4I")  # name, dtype, dimensions, shape (0 where there are fewer than 4)
CHECKSUM = struct.Struct("<I")
DTYPES = tuple(np.dtype(name) for name in ("<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2"))
LONGEST_KEY = 480  # bytes: a store prefixes it, and LMDB's keys end at 511


@dataclass(frozen=True)
class Record:
    """One user's record of one model version.

    as_of_us: the timestamp of the newest event in it, microseconds since 1970 UTC, -1 for none; num_events: events in
    it; arrays: one- or two-dimensional; ``tokens`` (K, D) float32 is subject to the codec.
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
    is_integer = text.lstrip("-").isdecimal() and str(int(text)) == text
    key = (b"i:" if is_integer else b"s:") + text.encode()
    if len(key) <= LONGEST_KEY:
        return key
    return b"h:" + key[: LONGEST_KEY - 2 - 64] + hashlib.sha256(key).hexdigest().encode()


def encode(record: Record, codec: str = "int8") -> bytes:
    """A record as bytes. Raises RecordError for an unknown codec, kind or array type, and for tokens not finite."""
    if codec not in CODECS or record.kind not in KINDS:
        raise RecordError(f"codec {codec!r}, kind {record.kind!r}: known are {CODECS} and {KINDS}")
    arrays: dict[str, np.ndarray] = {}
    for name, array in record.arrays.items():
        arrays |= _quantize(array, codec) if name == TOKENS else {name: array}
    table, body = [], []
    for name, array in arrays.items():
        stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if stored.dtype not in DTYPES or not 1 <= stored.ndim <= 4 or len(name.encode()) > 24:
            raise RecordError(f"array {name!r} of type {array.dtype} and shape {array.shape} cannot be stored")
        shape = (*stored.shape, 0, 0, 0)[:4]
        table.append(ENTRY.pack(name.encode(), DTYPES.index(stored.dtype), stored.ndim, *shape))
        body.append(stored.tobytes())
    size = HEADER.size + len(record.user_key) + ENTRY.size * len(table) + sum(map(len, body)) + CHECKSUM.size
    header = HEADER.pack(
        MAGIC, FORMAT_VERSION, KINDS.index(record.kind), CODECS.index(codec), len(table), len(record.user_key),
        record.num_events, record.as_of_us, record.version.encode(), size,
    )  # fmt: skip
    content = b"".join([header, record.user_key, *table, *body])
    return content + CHECKSUM.pack(zlib.crc32(content))


def decode(blob: bytes, version: str | None = None) -> Record:
    """A record from bytes, tokens as float32. version: refuse records of any other model version.

    Raises RecordError, saying what is wrong: too short, not a record, a newer format, a wrong size or checksum, an
    unknown kind, codec or type, shapes that do not fill the record, another model version.
    """
    codec, record = _parse(blob, version)
    return Record(**{**vars(record), "arrays": _dequantize(record.arrays, codec)})


def decode_tokens(blobs: Sequence[bytes], version: str | None = None) -> np.ndarray:
    """The tokens of B records of one shape and codec, (B, K, D) float32, all at once. Raises as ``decode``."""
    parsed = [_parse(blob, version) for blob in blobs]
    shapes = {(codec, record.arrays[TOKENS].shape) for codec, record in parsed}
    if len(shapes) > 1:
        raise RecordError(f"records of different codecs or shapes cannot be decoded together: {sorted(shapes)}")
    names = [name for name in (TOKENS, SCALE) if parsed and name in parsed[0][1].arrays]
    stacked = {name: np.stack([record.arrays[name] for _, record in parsed]) for name in names}
    return _dequantize(stacked, parsed[0][0])[TOKENS] if parsed else np.zeros((0, 0, 0), np.float32)


def _parse(blob: bytes, version: str | None) -> tuple[str, Record]:
    """Codec and record, its arrays as stored."""
    if len(blob) < HEADER.size + CHECKSUM.size:
        raise RecordError(f"truncated: {len(blob)} bytes, a header alone has {HEADER.size}")
    magic, found, kind, codec, num_arrays, key_bytes, num_events, as_of_us, written_by, size = HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise RecordError(f"not a record: starts with {magic!r}, not {MAGIC!r}")
    if found > FORMAT_VERSION:
        raise RecordError(f"format version {found}: this vista reads up to {FORMAT_VERSION}; update it")
    if size != len(blob):
        raise RecordError(f"truncated or overlong: {len(blob)} bytes where the header says {size}")
    if CHECKSUM.unpack_from(blob, size - CHECKSUM.size)[0] != zlib.crc32(memoryview(blob)[: -CHECKSUM.size]):
        raise RecordError("checksum mismatch: the record was damaged after it was written; summarize the user again")
    if kind >= len(KINDS) or codec >= len(CODECS):
        raise RecordError(f"unknown kind {kind} or codec {codec}")
    own_version = written_by.decode()
    if version is not None and own_version != version:
        raise RecordError(f"belongs to model version {own_version}, not {version}")
    place = HEADER.size + key_bytes
    key = bytes(blob[HEADER.size : place])
    arrays = _read_arrays(blob, place, num_arrays)
    return CODECS[codec], Record(KINDS[kind], own_version, key, as_of_us, num_events, arrays)


def _read_arrays(blob: bytes, place: int, num_arrays: int) -> dict[str, np.ndarray]:
    body = place + ENTRY.size * num_arrays
    arrays = {}
    for entry in range(num_arrays):
        if body > len(blob) - CHECKSUM.size:
            raise RecordError("the table of arrays reaches beyond the record")
        name, dtype, ndim, *shape = ENTRY.unpack_from(blob, place + ENTRY.size * entry)
        if dtype >= len(DTYPES) or not 1 <= ndim <= 4:
            raise RecordError(f"array {entry} has unknown type {dtype} or {ndim} dimensions")
        count = int(np.prod(shape[:ndim], dtype=np.int64))
        end = body + count * DTYPES[dtype].itemsize
        if end > len(blob) - CHECKSUM.size:
            raise RecordError(f"array {entry} of shape {tuple(shape[:ndim])} reaches beyond the record")
        values = np.frombuffer(blob, DTYPES[dtype], count, body)
        arrays[name.rstrip(b"\0").decode()] = values.reshape(shape[:ndim])
        body = end
    if body != len(blob) - CHECKSUM.size:
        raise RecordError(f"{len(blob) - CHECKSUM.size - body} bytes belong to no array")
    return arrays


def _quantize(tokens: np.ndarray, codec: str) -> dict[str, np.ndarray]:
    """tokens (K, D) as stored. int8: one scale per token, so that a large token does not cost the others precision."""
    if not np.isfinite(tokens).all():
        raise RecordError("tokens hold a value that is not finite: the model has diverged; train it again")
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
            scale = (np.abs(tokens).max(axis=1, initial=0.0) / 127).astype("<f4")
            safe = np.where(scale > 0, scale, 1)
            return {TOKENS: np.rint(tokens / safe[:, None]).astype("i1"), SCALE: scale}


def _dequantize(arrays: dict[str, np.ndarray], codec: str) -> dict[str, np.ndarray]:
    """The reverse, for (..., K, D); arrays that are not tokens pass through."""
    if TOKENS not in arrays:
        return arrays
    stored, rest = arrays[TOKENS], {name: a for name, a in arrays.items() if name not in (TOKENS, SCALE)}
    match codec:
        case "float32":
            tokens = stored
        case "float16":
            tokens = stored.view("<f2").astype("<f4")
        case "bfloat16":
            tokens = (stored.astype("<u4") << 16).view("<f4")
        case _:
            tokens = stored * arrays[SCALE][..., None]
    return {TOKENS: tokens, **rest}


def error_bound(tokens: np.ndarray, codec: str) -> np.ndarray:
    """The largest error of each value after a round trip, (K, D): half a step of the codec."""
    size = np.abs(tokens)
    match codec:
        case "float32":
            return np.zeros_like(size)
        case "float16":
            return np.maximum(size * 2.0**-11, 2.0**-25)  # the second: below the smallest normal number
        case "bfloat16":
            return np.maximum(size * 2.0**-8, 2.0**-133)
        case _:
            return np.broadcast_to(size.max(axis=1, keepdims=True) / 127 * 0.5001, size.shape)
