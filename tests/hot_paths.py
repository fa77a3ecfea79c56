"""What the hot paths cost, counted instead of timed: the same on any machine, however busy.

    python -m tests.hot_paths        counts anew and writes tests/hot_paths.json

Of each path: `calls`, operators that do something (views do not); `flops`, of matrix products; `bytes`, of all tensors
that operators read and write; `copied`, those of operators that only move numbers. For the sketch, and for
reading a store in batches, numpy's work: the calls, and the most memory at once.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.worlds import NUM_ACTIONS, catalogue, histories, slice_users
from tests.training.worlds import write_world
from vista.config import Config, resolve
from vista.models.embeddings import ItemTables
from vista.models.vista import SequenceModel, make_model
from vista.records import to_records
from vista.store.record import decode_tokens, encode, unpack
from vista.training.loop import Trainer, make_feeds

BASELINE = Path(__file__).with_suffix(".json")
ALLOWED = 1.2  # times the baseline
COPIES = ("clone", "copy_", "_to_copy", "cat", "stack", "contiguous")
Counts = dict[str, int]


class Counter(TorchDispatchMode):
    """Counts operators and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.copied = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in operator._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # not a view
            self.calls += 1
            moved = sum(t.nbytes for t in tensors_in([args, kwargs or {}, result]))
            self.bytes += moved
            self.copied += moved if operator.__name__.split(".")[0] in COPIES else 0
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, sparse ones left out."""
    if isinstance(value, Tensor):
        return [value] if value.layout == torch.strided else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for one in inside for t in tensors_in(one)]


def count(call: Callable[[], object]) -> Counts:
    call()  # what is made once is not counted
    with Counter() as counter:
        call()
    with FlopCounterMode(display=False) as flops:
        call()
    return {"calls": counter.calls, "flops": flops.get_total_flops(), "bytes": counter.bytes,
            "copied": counter.copied}  # fmt: skip


def count_python(call: Callable[[], object]) -> Counts:
    """For code that is numpy's and Python's."""
    call()
    calls = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    tracemalloc.start()
    try:
        call()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return {"calls": calls, "bytes": most}


def model_of(memory: str, has_sketch: bool = False) -> SequenceModel:
    torch.manual_seed(0)
    overrides = {"model.memory": memory, "model.num_layers": 2}
    config = resolve("small", overrides=overrides if has_sketch else overrides | {"model.sketch_slots": 0})
    model: Any = make_model(config.model, ItemTables.of(catalogue()), NUM_ACTIONS, 1, (), 0)
    return model.eval()


@torch.no_grad()
def reading_paths() -> dict[str, Counts]:
    found = {}
    lengths, new = [4_096, 1_000, 1_000], 70
    events = histories([n + new for n in lengths])
    whole, then = slice_users(events, [0] * 3, lengths), slice_users(events, lengths, [n + new for n in lengths])
    for name, model, counted in (
        ("sketch", model_of("slots", has_sketch=True), count_python),
        ("slots", model_of("slots"), count),
        ("sum", model_of("sum"), count),
    ):
        found[f"bulk fold, {name}"] = counted(lambda m=model: m.extend(m.init_state(3), whole))
        state = model.extend(model.init_state(3), whole)
        found[f"incremental extend, {name}"] = counted(lambda m=model, s=state: m.state_tokens(m.extend(s, then)))
    tokens, item = model.state_tokens(state), torch.arange(5, 45).repeat(3, 5)
    progress = state.progress
    now = progress.last_us + 1
    found["ranking"] = count(lambda: model.rank_users(tokens, state.recent, progress.num_events, now, item))
    records = [r for r in to_records(model, state, [1, 2, 3], "v" * 16) if r.kind == "tokens"]
    blobs = [encode(record, "int8") for record in records] * 16
    found["store batch decode"] = count_python(lambda: decode_tokens([unpack(blob) for blob in blobs]))
    return found


def training_path(folder: Path) -> dict[str, Counts]:
    """One optimizer step of size tiny on one batch."""
    data = write_world(folder / "data")
    config: Config = resolve("tiny", overrides={"train.requests_per_step": 24, "model.sketch_slots": 0})
    feeds, _ = make_feeds(data, config)
    torch.manual_seed(0)
    model: Any = make_model(config.model, ItemTables.of(catalogue()), NUM_ACTIONS, 1, (), 0)
    trainer = Trainer(model, feeds, config, folder)
    step = next(trainer._steps())
    try:
        return {"training step": count(lambda: trainer.train_step(step))}
    finally:
        trainer.writer.close()


def all_paths(folder: Path) -> dict[str, Counts]:
    return reading_paths() | training_path(folder)


def losses(found: dict[str, Counts], baseline: dict[str, Counts]) -> list[str]:
    """What costs more than is allowed, in words."""
    lines = []
    for path, counts in baseline.items():
        for what, before in counts.items():
            now = found[path][what]
            if now > ALLOWED * before:
                lines.append(f"{path}: {what} {before:,} -> {now:,} ({now / max(before, 1):.2f} times)")
    return lines


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        torch.set_num_threads(1)
        BASELINE.write_text(json.dumps(all_paths(Path(made)), indent=1) + "\n")
    print(BASELINE.read_text())
