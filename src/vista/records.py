"""User states to stored records and back.

Two records per user, committed together: ``tokens`` (hot: summary tokens, the newest raw events) and ``state`` (cold,
exact: what a stream goes on from). A third, ``border``, where kept borders are wanted. None holds anything that depends
on other users.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from vista.errors import RecordError
from vista.models.batch import flatten, unflatten
from vista.models.borders import Border, KeptBorders
from vista.models.inputs import Progress, Recent
from vista.models.memory import Running
from vista.models.sketch import Sketch
from vista.models.summarizer import UserState
from vista.models.vista import SequenceModel
from vista.store.record import Record, Stored, user_key

READOUT = "readout"  # the array of what candidates ask
SKETCH_ARRAYS = ("sketch_slot", "sketch_entries", "sketch_decayed", "sketch_clock")
PRECEDING_ARRAYS = ("sketch_preceding", "sketch_newest")
TRACE_ARRAYS = ("sketch_traced", "sketch_words", "sketch_marks")  # beside them, where the sketch has traces
RECENT_TYPES = {"item": np.int32, "action": np.int16, "timestamp_us": np.int64, "gap_us": np.int64}


def to_records(model: SequenceModel, state: UserState, user_ids: list[Any], version: str) -> list[Record]:
    """The tokens and state records of B users, two per user, with the tokens as of each newest closed border."""
    kinds = (records(model, state, user_ids, version) for records in (tokens_records, state_records))
    return [record for pair in zip(*kinds, strict=True) for record in pair]


@torch.no_grad()
def tokens_records(
    model: SequenceModel, state: UserState, user_ids: list[Any], version: str, alone: bool = False
) -> list[Record]:
    """The tokens records of B users. alone: read each by itself, as ``Summarizer.extend`` folds segments."""
    if alone and state.num_users > 1:
        each = (one_user(state, row) for row in range(state.num_users))
        return [
            record
            for one, user_id in zip(each, user_ids, strict=True)
            for record in tokens_records(model, one, [user_id], version)
        ]
    tokens, readout = model.state_tokens(state).float().cpu().numpy(), model.state_readout(state)
    state = state.to("cpu")
    sketch = model.state_sketch(state)
    newest = model.config.recent_events
    records = []
    for row, (user, recent) in enumerate(zip(user_ids, recent_arrays(state), strict=True)):
        hot = {name: array[-newest:] for name, array in recent.items()} | {"tokens": tokens[row]}
        hot |= {} if readout is None else {READOUT: readout[row].float().cpu().numpy()}
        hot |= sketch_arrays(model.sketch, tuple(t[row] for t in sketch))
        records.append(Record("tokens", version, *_facts(state, row, user), hot))
    return records


@torch.no_grad()
def state_records(model: SequenceModel, state: UserState, user_ids: list[Any], version: str) -> list[Record]:
    """The state records of B users."""
    state = state.to("cpu")
    sketch = model.state_sketch(state)
    memory = [t.numpy() for t in flatten(state.memory[:-1] if sketch else state.memory)]
    records = []
    for row, (user, recent) in enumerate(zip(user_ids, recent_arrays(state), strict=True)):
        cold = recent | {f"memory_{i}": t[row] for i, t in enumerate(memory)}
        cold |= sketch_arrays(model.sketch, tuple(t[row] for t in sketch))
        cold["first_us"] = state.progress.first_us[row : row + 1].numpy()
        records.append(Record("state", version, *_facts(state, row, user), cold))
    return records


def recent_arrays(state: UserState) -> list[dict[str, np.ndarray]]:
    """All events held of each user, as a record has them."""
    columns = {f"recent_{n}": getattr(state.recent, n).numpy().astype(t) for n, t in RECENT_TYPES.items()}
    held = columns["recent_item"] > 0
    return [{name: column[row][held[row]] for name, column in columns.items()} for row in range(state.num_users)]


def _facts(state: UserState, row: int, user_id: Any) -> tuple[bytes, int, int]:
    return user_key(user_id), int(state.progress.last_us[row]), int(state.progress.num_events[row])


def one_user(state: UserState, row: int) -> UserState:
    """One of the users of a state."""
    chosen = slice(row, row + 1)
    progress = Progress(*(getattr(state.progress, f.name)[chosen] for f in fields(Progress)))
    recent = Recent(*(getattr(state.recent, f.name)[chosen] for f in fields(Recent)))
    # clones: the address of a tensor's first byte may choose another way through a matrix product
    return UserState(progress, recent, unflatten([t[chosen].clone() for t in flatten(state.memory)], state.memory))


def from_records(model: SequenceModel, records: list[Record | None]) -> UserState:
    """The states that ``to_records`` stored; None stands for a user without events."""
    initial = model.init_state(len(records))
    progress = Progress(
        *(t.clone() for t in (initial.progress.num_events, initial.progress.first_us, initial.progress.last_us))
    )
    held = max((len(r.arrays["recent_item"]) for r in records if r is not None), default=0)
    recent = Recent.empty(len(records), max(held, initial.recent.item.shape[1]))
    memory = [t.clone() for t in flatten(initial.memory)]
    sketch = unflatten(memory, initial.memory)[-1][0] if model.sketch is not None else ()
    for row, record in enumerate(records):
        if record is None:
            continue
        progress.num_events[row], progress.last_us[row] = record.num_events, record.as_of_us
        progress.first_us[row] = int(record.arrays["first_us"][0])
        fill_recent(recent, row, record)
        for i, tensor in enumerate(memory[: len(memory) - len(sketch)]):
            tensor.numpy()[row] = record.arrays[f"memory_{i}"]  # in place, as in fill_recent
        if model.sketch is not None:
            fill_sketch(model.sketch, sketch, row, record)
    return UserState(progress, recent, unflatten(memory, initial.memory))


def fill_recent(recent: Recent, row: int, record: Record | Stored) -> None:
    """Put a record's recent events into one row, newest last."""
    for name in RECENT_TYPES:
        column = record.arrays[f"recent_{name}"]
        place = getattr(recent, name).numpy()[row]  # in place, and without a tensor per user and column
        place[len(place) - len(column) :] = column


def fill_readout(readout: torch.Tensor, row: int, record: Record | Stored) -> None:
    """Put what a record's candidates ask into one row of (B, H, E, columns). Raises RecordError where it has none."""
    own = record.arrays.get(READOUT)
    if own is None or own.shape != readout.shape[1:]:
        found = f"no {READOUT}" if own is None else f"a {READOUT} of shape {own.shape}"
        raise RecordError(
            f"user {record.user_key.decode(errors='replace')}: {found} in a record of a model whose candidates ask one "
            f"of shape {tuple(readout.shape[1:])}; summarize the user again"
        )
    readout.numpy()[row] = own


def sketch_arrays(sketch: Sketch | None, running: Running) -> dict[str, np.ndarray]:
    """One user's sketch as a record holds it: the slots that have an entry, and the clock; the slots that have a trace
    (a bit for each, nothing where none has one), these traces, and the marks made so far; what came before the entries
    of items, and the newest event. """  # fmt: skip
    if sketch is None:
        return {}
    part = dict(zip(sketch.names, (t.numpy() for t in running), strict=True))
    entries, decayed = part["sketch_entries"], part["sketch_decayed"]
    slot = np.flatnonzero(entries[:, 0])
    values = (slot.astype(np.int32), entries[slot], decayed[slot].astype(np.float32), part["sketch_clock"])
    arrays = dict(zip(SKETCH_ARRAYS, values, strict=True))
    if "trace_words" in part:
        words, marks = part["trace_words"], part["trace_marks"]
        traced = np.packbits(words != 0) if words.any() else np.zeros(0, np.uint8)
        arrays |= dict(zip(TRACE_ARRAYS, (traced, words[words != 0], np.trim_zeros(marks, "b")), strict=True))
    if "sketch_preceding" in part:
        preceding = part["sketch_preceding"]
        kept = preceding[slot[slot < len(preceding)]]  # the slots of items are the first
        arrays |= dict(zip(PRECEDING_ARRAYS, (kept, part["sketch_newest"]), strict=True))
    return arrays


def fill_sketch(sketch: Sketch, running: Running, row: int, record: Record | Stored) -> None:
    """Put a record's sketch into one row of empty ones (B, ...). Raises RecordError where the record has none."""
    part = dict(zip(sketch.names, (t.numpy() for t in running), strict=True))
    has_traces, has_preceding = "trace_words" in part, "sketch_preceding" in part
    needed = (*SKETCH_ARRAYS, *TRACE_ARRAYS * has_traces, *PRECEDING_ARRAYS * has_preceding)
    missing = [name for name in needed if name not in record.arrays]
    if missing:
        raise RecordError(f"no {missing[0]} in a record of a model with a sketch; summarize the user again")
    slot, entries, decayed, clock = (record.arrays[name] for name in SKETCH_ARRAYS)
    part["sketch_entries"][row, slot] = entries
    part["sketch_decayed"][row, slot] = decayed
    part["sketch_clock"][row] = clock
    if has_traces:
        traced, words, marks = (record.arrays[name] for name in TRACE_ARRAYS)
        part["trace_words"][row, np.flatnonzero(np.unpackbits(traced))] = words
        part["trace_marks"][row, : len(marks)] = marks
    if has_preceding:
        preceding, newest = (record.arrays[name] for name in PRECEDING_ARRAYS)
        part["sketch_preceding"][row, slot[: len(preceding)]] = preceding
        part["sketch_newest"][row] = newest


BORDER_NUMBERS = ("num_events", "first_us", "last_us", "num_ties")  # stored as border_num_events and so on


def borders_to_record(kept: KeptBorders, user_id: Any, version: str) -> Record:
    """The border record of one user: per border its numbers, (M,) each, and its memory's tensors, (M, ...) each."""
    borders = kept.borders
    arrays = {f"border_{n}": np.array([getattr(b, n) for b in borders], np.int64) for n in BORDER_NUMBERS}
    memories = zip(*(border.memory for border in borders), strict=True)
    arrays |= {f"memory_{i}": torch.stack(rows).numpy() for i, rows in enumerate(memories)}
    last_us, num_events = (borders[-1].last_us, borders[-1].num_events) if borders else (-1, 0)
    return Record("border", version, user_key(user_id), last_us, num_events, arrays)


def borders_from_record(record: Record) -> KeptBorders:
    """The kept borders that ``borders_to_record`` stored."""
    numbers = [record.arrays[f"border_{name}"].tolist() for name in BORDER_NUMBERS]
    num_tensors = len(record.arrays) - len(BORDER_NUMBERS)
    memory = [torch.from_numpy(record.arrays[f"memory_{i}"].copy()) for i in range(num_tensors)]
    return KeptBorders(
        tuple(
            Border(num_events, first_us, last_us, num_ties, tuple(t[i] for t in memory))
            for i, (num_events, first_us, last_us, num_ties) in enumerate(zip(*numbers, strict=True))
        )
    )
