"""What kept borders save when an event comes late, and what they cost in the store.

    python bench/replay.py [--lengths 10000 100000 1000000] [--size small] [--memories sum slots] [--out FOLDER]

For each memory and length, one history is read with and without kept borders; then one late event is applied to its
state, of ages from 10 events up to the whole history. An age is how many events of the history are newer. Measured are
the events that are read again, the seconds from the event's arrival to the new state, and the bytes of the records that
the store keeps for the user. Beside it: events read again per event of age, over late events of every age from one
segment on (mean, mean with every order of magnitude of the age weighted alike, and the largest).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.config import resolve
from vista.models.borders import Spacing
from vista.models.embeddings import ItemTables
from vista.models.vista import SequenceModel, make_model
from vista.records import borders_to_record, to_records
from vista.store.record import encode
from vista.updates.apply import Update, UpdateOptions, update_states
from vista.updates.order import UNKNOWN_ID, Arrivals
from vista.updates.refold import Tracked, refold, start_border
from vista.updates.source import NEVER_US
from vista.updates.stored import Changed

NUM_ITEMS = 20_000
FIRST_AGE = 10
SPACINGS = {"none kept": None, "base 2": Spacing(2, 2), "base 4": Spacing(4, 2)}
START_US = 10**15
DESCRIBED = " {spacing:>10}  age {age:>9,}: {events_read:>9,} read again, {seconds:8.4f} s"


@dataclass(frozen=True)
class HistoryAndOne:
    """A replay source: one history and one event that arrived after it."""

    history: Arrivals
    late: Arrivals

    def record(self, user_ids: Sequence[Any], events: Arrivals) -> None:
        """It is in already."""

    def events(self, user_id: Any, since_us: int) -> Arrivals:
        first = int(np.searchsorted(self.history.timestamp_us, since_us))
        parts = [self.history.take(np.arange(first, len(self.history))), self.late]
        return Arrivals.join([part.take(part.timestamp_us >= since_us) for part in parts])

    def earliest_us(self, user_ids: Sequence[Any], event_id: np.ndarray) -> np.ndarray:
        return np.full(len(event_id), NEVER_US)


def make_history(length: int, seed: int = 0) -> Arrivals:
    rng = np.random.default_rng(seed)
    times = START_US + np.cumsum(rng.integers(2, 10**9, length))
    items = rng.zipf(1.2, length) % NUM_ITEMS + 65
    zero = np.zeros(length, np.int64)
    return Arrivals(zero, items, zero + 1, times, zero + UNKNOWN_ID)


def make_sequence_model(size: str, memory: str) -> SequenceModel:
    torch.manual_seed(0)
    config = resolve(size, overrides={"model.memory": memory}).model
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(65 + NUM_ITEMS, dtype=np.int32))
    model = make_model(config, ItemTables.of(catalogue), 1, 1, (), 0).eval()
    assert isinstance(model, SequenceModel)
    return model


def apply_late(
    model: SequenceModel, tracked: Tracked, history: Arrivals, age: int, spacing: Spacing | None
) -> tuple[Changed, Update, float]:
    """One event with ``age`` newer ones in the history: the new state, what was read for it, seconds."""
    late_us = history.timestamp_us[len(history) - age] - 1
    one = np.ones(1, np.int64)
    late = Arrivals(0 * one, 100 * one, one, late_us * one, UNKNOWN_ID * one)
    started = time.perf_counter()
    changed, update = update_states(
        model, tracked, late, ["user"], UpdateOptions(HistoryAndOne(history, late), spacing)
    )
    return changed, update, time.perf_counter() - started


def ages_of(length: int) -> list[int]:
    ages = [FIRST_AGE]
    while ages[-1] * 10 < length:
        ages.append(ages[-1] * 10)
    return [*ages, length]


@torch.no_grad()
def measure(size: str, memory: str, length: int) -> dict[str, Any]:
    model, history = make_sequence_model(size, memory), make_history(length)
    fresh = Tracked.of(model.init_state(1))
    rows, storage, tokens = [], {}, {}
    for name, spacing in SPACINGS.items():
        tracked = refold(model, fresh, [start_border(model)], history, spacing)
        kept = encode(borders_to_record(tracked.borders[0], "user", "bench"))
        records = {r.kind: len(encode(r)) for r in to_records(model, tracked.state, ["user"], "bench")}
        storage[name] = records | {"border": len(kept) if spacing else 0, "kept": len(tracked.borders[0].borders)}
        for age in ages_of(length):
            changed, update, seconds = apply_late(model, tracked, history, age, spacing)
            found = model.state_tokens(changed.tracked.state)
            drift = float((found - tokens.setdefault(age, found)).abs().max())
            assert drift < 1e-4, f"age {age}, {name}: tokens differ by {drift} from those of a replay of everything"
            row = {"spacing": name, "age": age, "events_read": update.num_replayed_events, "seconds": seconds}
            rows.append(row)
            print(f"{memory:>6} {length:>9,} events", DESCRIBED.format(**row), flush=True)
    relative = {name: relative_read(spacing, length, model.config.segment_events) for name, spacing in SPACINGS.items()}
    return {
        "memory": memory,
        "length": length,
        "late_events": rows,
        "bytes_per_user": storage,
        "read_per_age": relative,
    }


def relative_read(spacing: Spacing | None, length: int, segment_events: int) -> dict[str, float]:
    """Events read again divided by the age: mean and largest over late events of every age from one segment on."""
    closed = length // segment_events
    kept = np.array([0, *(spacing.kept(closed) if spacing else []), *([closed] if spacing else [])]) * segment_events
    age = np.arange(segment_events, length + 1)
    base = kept[np.searchsorted(kept, length - age, side="right") - 1]
    share = (length - base) / age
    return {
        "mean": float(share.mean()),
        "largest": float(share.max()),
        "mean_log_age": float(np.average(share, weights=1 / age)),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    read, stored = figure.subplots(1, 2)
    longest = max((r for r in results if r["memory"] == results[-1]["memory"]), key=lambda r: r["length"])
    for name in SPACINGS:
        rows = [row for row in longest["late_events"] if row["spacing"] == name]
        read.loglog([row["age"] for row in rows], [max(row["events_read"], 1) for row in rows], "o-", label=name)
    read.set(
        xlabel="age of the late event, in events", ylabel="events read again", title=f"{longest['length']:,} events"
    )
    for memory in dict.fromkeys(r["memory"] for r in results):
        for name in list(SPACINGS)[1:]:
            mine = [r for r in results if r["memory"] == memory]
            kilobytes = [r["bytes_per_user"][name]["border"] / 1000 for r in mine]
            stored.semilogx([r["length"] for r in mine], kilobytes, "o-", label=f"{memory}, {name}")
    stored.set(xlabel="events in the history", ylabel="kB per user", title="Kept borders in the store", ylim=(0, None))
    for axes in (read, stored):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--size", default="small")
    parser.add_argument("--memories", nargs="+", default=["sum", "slots"], choices=["sum", "slots"])
    parser.add_argument("--out", type=Path, help="folder for replay.json and replay.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, size {arguments.size}")
    results = [measure(arguments.size, m, n) for m in arguments.memories for n in sorted(arguments.lengths)]
    for result in results:
        print(json.dumps({k: result[k] for k in ("memory", "length", "bytes_per_user", "read_per_age")}))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "replay.json").write_text(json.dumps(results, indent=2) + "\n")
        plot(results, arguments.out / "replay.png")


if __name__ == "__main__":
    main()
