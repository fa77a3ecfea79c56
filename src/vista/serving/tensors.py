"""Rankings as the Open Inference Protocol has them: named tensors in, named tensors out, whatever carries them.

    user        BYTES or INT64  [1], or [B]             candidates  BYTES or INT64  [C], or [B, C]
    at_us       INT64           [1], or [B]; optional   context     FP32  [C, X], or [B, C, X]; optional

    scores         FP32  [C, T], or [B, C, T]           is_known_item  BOOL  [C], or [B, C]
    is_known_user  BOOL  [1], or [B]    num_events  INT64 [1], or [B]    as_of_us  INT64 [1], or [B]

The form of ``candidates`` decides: without B, one user. ``context`` has the columns of the model's metadata, in their
order, as prepared data holds them (a category is its bucket), NaN where a value is not given.

Shape letters: B users, C candidates, T tasks, X context columns.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.errors import RequestError, nearest
from vista.schema import NUM_CONTEXT_BUCKETS
from vista.serving.deployment import Model
from vista.serving.options import Limits
from vista.serving.requests import LARGEST_NUMBER, LATEST_US, check_ids, check_number, shown
from vista.serving.scorer import Asked
from vista.serving.service import Query, Ranked

MODEL_NAME = "vista"
TYPES = {"BOOL": np.dtype(bool), "INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
INPUTS = {"user": ("BYTES", "INT64"), "candidates": ("BYTES", "INT64"), "at_us": ("INT64",), "context": ("FP32",)}
OUTPUTS = ("scores", "is_known_item", "is_known_user", "num_events", "as_of_us")
LENGTH = struct.Struct("<I")  # before each element of BYTES
MAX_DIMENSIONS = 3
MOST_COLUMNS = 256  # of context: a bound on what is read before the model is asked


@dataclass(frozen=True)
class Tensor:
    """One tensor. data: an array of its shape; of objects, ``str``, where the type is BYTES."""

    name: str
    datatype: str
    data: np.ndarray

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)


def inputs_of(model: Model) -> list[dict[str, Any]]:
    """The inputs, as metadata has them; -1 is any size."""
    columns = len(model.run.schema.context)
    shapes = {"user": [-1], "candidates": [-1, -1], "at_us": [-1], "context": [-1, -1, columns]}
    return [
        {"name": name, "datatype": INPUTS[name][0], "shape": shape}
        for name, shape in shapes.items()
        if columns or name != "context"
    ]


def outputs_of(model: Model) -> list[dict[str, Any]]:
    """The outputs, as metadata has them."""
    return [
        {"name": "scores", "datatype": "FP32", "shape": [-1, -1, len(model.run.schema.tasks)]},
        {"name": "is_known_item", "datatype": "BOOL", "shape": [-1, -1]},
        {"name": "is_known_user", "datatype": "BOOL", "shape": [-1]},
        {"name": "num_events", "datatype": "INT64", "shape": [-1]},
        {"name": "as_of_us", "datatype": "INT64", "shape": [-1]},
    ]


def check_type(name: Any, datatype: Any) -> None:
    """Raise RequestError for an input that is none, or of a type it cannot have."""
    if not isinstance(name, str) or name not in INPUTS:
        raise RequestError(f"there is no input {shown(name)}{nearest(str(name)[:80], INPUTS)}")
    if datatype not in INPUTS[name]:
        raise RequestError(f"input {name}: datatype {shown(datatype)}; it is {' or '.join(INPUTS[name])}")


def check_shape(shape: Any, name: str, limits: Limits) -> list[int]:
    """A shape whose size is bounded. Raises RequestError."""
    is_list = isinstance(shape, list) and 1 <= len(shape) <= MAX_DIMENSIONS
    if not is_list or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape):
        raise RequestError(f"input {name}: shape {shown(str(shape))}; give 1 to {MAX_DIMENSIONS} positive integers")
    most = limits.max_candidates * (MOST_COLUMNS if name == "context" else 1)
    check_number(math.prod(shape), most, f"values of {name}")
    return list(shape)


def from_bytes(name: str, datatype: str, shape: list[int], raw: memoryview | bytes) -> Tensor:
    """A tensor from the binary form. Raises RequestError where the bytes are too few or too many."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, _objects(_strings(name, bytes(raw), count), shape))
    size = count * TYPES[datatype].itemsize
    if len(raw) != size:
        raise RequestError(f"input {name}: {len(raw)} bytes; shape {shape} of {datatype} takes {size}")
    return Tensor(name, datatype, np.frombuffer(raw, TYPES[datatype]).reshape(shape))


def _strings(name: str, raw: bytes, count: int) -> list[str]:
    """Elements of BYTES: a length of 4 bytes before each."""
    found: list[str] = []
    place = 0
    while place + LENGTH.size <= len(raw) and len(found) < count:
        (length,) = LENGTH.unpack_from(raw, place)
        place += LENGTH.size + length
        if place > len(raw):
            break
        found.append(_text(name, raw[place - length : place], len(found)))
    if len(found) != count or place != len(raw):
        raise RequestError(
            f"input {name}: {len(raw)} bytes do not hold {count} elements of BYTES, each behind its length in 4 bytes"
        )
    return found


def _text(name: str, value: bytes, place: int) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"input {name}: element {place} is not UTF-8; an id is text, or send INT64") from error


def from_values(name: str, datatype: str, shape: list[int], values: Any) -> Tensor:
    """A tensor from a list, nested or flat. Raises RequestError."""
    flat = _flatten(values, name)
    if len(flat) != math.prod(shape):
        raise RequestError(f"input {name}: {len(flat)} values for shape {shape}")
    if datatype == "BYTES":
        texts = [_text(name, one, place) if isinstance(one, bytes) else one for place, one in enumerate(flat)]
        wrong = [one for one in texts if not isinstance(one, str)]
        if wrong:
            raise RequestError(f"input {name}: {shown(wrong[0])} is no string, as BYTES are; or send INT64")
        return Tensor(name, datatype, _objects(texts, shape))
    numbers = (int,) if datatype == "INT64" else (int, float)
    largest = 2**63 - 1 if datatype == "INT64" else LARGEST_NUMBER
    wrong = [one for one in flat if not isinstance(one, numbers) or isinstance(one, bool) or abs(one) > largest]
    if wrong:
        raise RequestError(f"input {name}: {shown(wrong[0])} is not of datatype {datatype}")
    return Tensor(name, datatype, np.array(flat, TYPES[datatype]).reshape(shape))


def _flatten(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list):
        raise RequestError(f"input {name}: data is {shown(values)}; give a list")
    for _ in range(MAX_DIMENSIONS - 1):
        if values and all(isinstance(one, list) for one in values):
            values = [inner for one in values for inner in one]
    return values


def _objects(values: Sequence[Any], shape: list[int]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def to_bytes(tensor: Tensor) -> bytes:
    """The binary form of an output; none of them is of BYTES."""
    return np.ascontiguousarray(tensor.data, TYPES[tensor.datatype]).tobytes()


def check_outputs(names: Sequence[Any]) -> list[str]:
    """The outputs asked for, each once, all where none is named. Raises RequestError for one that is none."""
    for name in names:
        if not isinstance(name, str) or name not in OUTPUTS:
            raise RequestError(f"there is no output {shown(name)}{nearest(str(name)[:80], OUTPUTS)}")
    return list(dict.fromkeys(names)) or list(OUTPUTS)


def queries_of(model: Model, tensors: Sequence[Tensor], limits: Limits) -> tuple[list[Query], bool]:
    """What is asked, per user, and whether there is a B. Raises RequestError for tensors that do not fit together."""
    given = {tensor.name: tensor.data for tensor in tensors}
    if len(given) < len(tensors):
        raise RequestError("an input stands twice; send each once")
    for name in ("user", "candidates"):
        if name not in given:
            raise RequestError(f"the input {name!r} is missing")
    candidates = given["candidates"]
    if candidates.ndim > 2:
        raise RequestError(f"input candidates: shape {list(candidates.shape)}; it is [C] or [B, C]")
    is_batch = candidates.ndim == 2
    candidates = candidates if is_batch else candidates[None]
    check_number(len(candidates), limits.max_waiting, "users")
    users, at_us = _of_users(given, len(candidates))
    check_ids(candidates.ravel().tolist(), "input candidates")
    context = _context(model, given.get("context"), candidates.shape)
    index = model.run.catalogue.encode(candidates.ravel().tolist()).reshape(candidates.shape)
    rows = zip(users, index, at_us, context, strict=True)
    return [Query(model, user, Asked(own, at, one)) for user, own, at, one in rows], is_batch


def _of_users(given: dict[str, np.ndarray], num_users: int) -> tuple[list[Any], list[int]]:
    """User ids and moments, one per user. Raises RequestError."""
    users, at_us = given["user"], given.get("at_us", np.array([time.time_ns() // 1000]))
    at_us = np.repeat(at_us, num_users) if at_us.shape == (1,) else at_us
    for name, array in (("user", users), ("at_us", at_us)):
        if array.shape != (num_users,):
            raise RequestError(f"input {name}: shape {list(array.shape)} for {num_users} users; it is [{num_users}]")
    if not ((at_us >= 0) & (at_us <= LATEST_US)).all():
        raise RequestError("input at_us: a value is no time; give microseconds since 1970 UTC")
    check_ids(users.tolist(), "input user")
    return users.tolist(), at_us.tolist()


def _context(model: Model, given: np.ndarray | None, shape: tuple[int, ...]) -> Sequence[np.ndarray | None]:
    """Per user (C, X), checked: a bucket beyond the table would be read from nowhere."""
    columns = model.run.schema.context
    if given is None:
        return [None] * shape[0]
    given = given if given.ndim == 3 else given[None]
    wanted = [*shape, len(columns)]
    if list(given.shape) != wanted:
        raise RequestError(f"input context: shape {list(given.shape)}; with these candidates it is {wanted}")
    if np.isinf(given).any():
        raise RequestError("input context: a value is infinite; give finite numbers, NaN where a value is not given")
    for place, column in enumerate(columns):
        own = given[..., place]
        own = own[~np.isnan(own)]
        if column.kind == "category" and ((own < 0) | (own >= NUM_CONTEXT_BUCKETS) | (own != np.floor(own))).any():
            raise RequestError(
                f"input context: column {column.name} is a category; give its bucket, 0 to {NUM_CONTEXT_BUCKETS - 1}, "
                "or use /v1/rank, which takes the category itself"
            )
    return list(given)


def answer_tensors(found: Sequence[Ranked], is_batch: bool, wanted: Sequence[str]) -> list[Tensor]:
    """The outputs."""
    rankings = [one.ranking for one in found]
    scores = np.stack([ranking.probability for ranking in rankings]).astype(np.float32)
    known = np.stack([ranking.is_known_item for ranking in rankings])
    made = {
        "scores": Tensor("scores", "FP32", scores if is_batch else scores[0]),
        "is_known_item": Tensor("is_known_item", "BOOL", known if is_batch else known[0]),
        "is_known_user": Tensor("is_known_user", "BOOL", np.array([r.is_known_user for r in rankings])),
        "num_events": Tensor("num_events", "INT64", np.array([r.num_events for r in rankings], np.int64)),
        "as_of_us": Tensor("as_of_us", "INT64", np.array([r.as_of_us for r in rankings], np.int64)),
    }
    return [made[name] for name in wanted]
