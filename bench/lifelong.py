"""Constant memory, constant cost: reading a history of any length, and what one more event costs after it.

    python bench/lifelong.py [--lengths 1000 10000 100000 1000000] [--repeats 200] [--size small] [--out FOLDER]

For each length, in a process of its own (so that its peak memory is its own), with the history memory-mapped from disk:

- read: events per second from the first event to the summary tokens, and the peak resident memory of the process;
- new event: `extend` by one event and `read`, median over repeats, the lengths in turn in one process. The open segment
  is half full at every length.

Beside it, in the same process: the same layer with softmax attention (torch's own, causal) and with HSTU's SiLU
attention (blockwise), whose new event costs a pass over the history, as long as they finish within SLOWEST_S.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from vista.catalogue import Catalogue
from vista.config import resolve
from vista.data.histories import Histories
from vista.jobs.fold import EVENTS_READ_AT_ONCE, read_in_parts
from vista.models.embeddings import EventEmbedding, ItemEmbedding, ItemTables
from vista.models.inputs import Events
from vista.models.layers import join_heads, norm, split_heads
from vista.models.summarizer import Summarizer, UserState

NUM_ITEMS = 20_000
SLOWEST_S = 90.0  # a peer that took longer at one length is not tried at the next
WARM_UP_SEGMENTS = 8  # read before the clock starts: the first calls of a process are slow
PEERS, STATE = ("softmax", "hstu"), "state.pt"
BLOCK = 256  # query rows of one block of HSTU's attention: the scores of a block fit the cache


def write_log(folder: Path, length: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    np.save(folder / "offsets.npy", np.array([0, length]))
    np.save(folder / "item.npy", (rng.zipf(1.2, length) % NUM_ITEMS + 65).astype(np.int32))
    np.save(folder / "action.npy", np.ones(length, np.int16))
    np.save(folder / "timestamp_us.npy", 10**15 + np.cumsum(rng.integers(1, 10**9, length)))


def make_summarizer(size: str) -> Summarizer:
    torch.manual_seed(0)
    config = resolve(size).model
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(65 + NUM_ITEMS, dtype=np.int32))
    items = ItemEmbedding(ItemTables.of(catalogue), config.width)
    return Summarizer(config, EventEmbedding(items, 1, config.width)).eval()


@torch.no_grad()
def measure_one(folder: Path, size: str, peers: list[str]) -> dict[str, float]:
    """In this process: everything about the one history in ``folder``."""
    torch.set_num_threads(1)
    model = make_summarizer(size)
    names = ("offsets", "item", "action", "timestamp_us")
    log = Histories(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))
    length, segment = log.num_events, model.config.segment_events
    half_open = length // segment * segment - segment // 2
    cut = Histories(np.array([0, half_open]), log.item, log.action, log.timestamp_us)
    warm_up = Histories(
        np.array([0, min(half_open, WARM_UP_SEGMENTS * segment)]), *(getattr(log, n) for n in names[1:])
    )
    read(model, warm_up)
    started = time.perf_counter()
    state = read(model, cut)
    read_s = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save(state, folder / STATE)
    row = {"events": length, "read_s": read_s, "peak_bytes": peak_bytes}
    forms = {"softmax": softmax_layer, "hstu": hstu_layer}
    for name in peers:
        started = time.perf_counter()
        forms[name](model, log)
        row[f"{name}_s"] = time.perf_counter() - started
    return row


def read(model: Summarizer, log: Histories) -> UserState:
    """The state after the one history, and its tokens made once."""
    state = model.init_state(1)
    for events in read_in_parts(log, np.array([0]), EVENTS_READ_AT_ONCE):
        state = model.extend(state, events)
    model.read(state)
    return state


def peer_inputs(model: Summarizer, log: Histories) -> tuple[Tensor, Tensor, Tensor]:
    events = next(read_in_parts(log, np.array([0]), log.num_events))
    layer, heads = model.layers[0], model.config.num_heads
    h = norm(model.embedding(events.item, events.action, events.timestamp_us, events.gap_us))
    projections = (layer.key, layer.key, layer.value)  # the size of query, key and value is what counts here
    return tuple(split_heads(p(h), heads)[None] for p in projections)  # type: ignore[return-value]


def softmax_layer(model: Summarizer, log: Histories) -> Tensor:
    q, k, v = peer_inputs(model, log)
    return model.layers[0].out(join_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))


def hstu_layer(model: Summarizer, log: Histories) -> Tensor:
    """Pointwise SiLU attention, causal, divided by the length; blocks of query rows."""
    q, k, v = peer_inputs(model, log)
    length = q.shape[-2]
    out = torch.empty_like(v)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        scores = silu(q[..., start:end, :] @ k[..., :end, :].transpose(-2, -1)) / length
        scores[..., start:] *= torch.ones(end - start, end - start).tril()
        out[..., start:end, :] = scores @ v[..., :end, :]
    return model.layers[0].out(join_heads(out))


def measure(lengths: list[int], size: str, repeats: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            place = Path(folder) / str(length)
            place.mkdir()
            write_log(place, length)
            # as far as can be told from the last length: attention grows with the square of it
            growth = (length / rows[-1]["events"]) ** 2 if rows else 0.0
            able = [p for p in PEERS if not rows or rows[-1].get(f"{p}_s", SLOWEST_S) * growth < SLOWEST_S]
            command = [sys.executable, __file__, "--one", str(place), "--size", size, "--peers", *able]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(describe_read(rows[-1]), flush=True)
        states = [torch.load(Path(folder) / str(length) / STATE, weights_only=False) for length in lengths]
    for row, seconds in zip(rows, new_event_s(make_summarizer(size), states, repeats), strict=True):
        row["new_event_s"] = seconds
        print(describe_new_event(row, rows[0]), flush=True)
    return rows


@torch.no_grad()
def new_event_s(model: Summarizer, states: list[UserState], repeats: int) -> list[float]:
    """Seconds of `extend` by one event and `read`, per state; in turn, so that a busy machine slows all alike."""
    torch.set_num_threads(1)
    times: list[list[float]] = [[] for _ in states]
    for _ in range(repeats):
        for state, mine in zip(states, times, strict=True):
            time_us = state.progress.last_us + 10**6
            one = Events.from_log(torch.tensor([100]), torch.tensor([1]), time_us, torch.tensor([0, 1]))
            started = time.perf_counter()
            model.read(model.extend(state, one))
            mine.append(time.perf_counter() - started)
    return [statistics.median(mine[len(mine) // 10 :]) for mine in times]  # without the first, which warm up


def describe_read(row: dict[str, float]) -> str:
    peers = "".join(f"  {name} {row[f'{name}_s']:.3g} s" for name in PEERS if f"{name}_s" in row)
    return (
        f"{row['events']:>9,} events  read {row['read_s']:.3g} s ({row['events'] / row['read_s']:,.0f} events/s)  "
        f"peak {row['peak_bytes'] / 2**20:,.0f} MiB{peers}"
    )


def describe_new_event(row: dict[str, float], first: dict[str, float]) -> str:
    others = {"the whole history": "read_s", "softmax, one layer": "softmax_s", "HSTU, one layer": "hstu_s"}
    costs = ", ".join(f"{what} {row[key] / row['new_event_s']:,.0f} x" for what, key in others.items() if key in row)
    return (
        f"{row['events']:>9,} events  new event {row['new_event_s'] * 1000:.2f} ms "
        f"({row['new_event_s'] / first['new_event_s']:.2f} x that at {first['events']:,.0f}); beside it: {costs}"
    )


def plot(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    cost, memory = figure.subplots(1, 2)
    events = [row["events"] for row in rows]
    cost.loglog(events, [1000 * row["new_event_s"] for row in rows], "o-", label="VISTA: one new event")
    cost.loglog(events, [1000 * row["read_s"] for row in rows], "s-", label="VISTA: the whole history")
    for name, label in (("softmax", "softmax attention, one layer"), ("hstu", "HSTU attention, one layer")):
        known = [row for row in rows if f"{name}_s" in row]
        cost.loglog([r["events"] for r in known], [1000 * r[f"{name}_s"] for r in known], "^--", label=label)
    cost.set(xlabel="events in the history", ylabel="ms", title="Cost")
    cost.legend(fontsize=8)
    memory.semilogx(events, [row["peak_bytes"] / 2**20 for row in rows], "o-")
    memory.set(xlabel="events in the history", ylabel="MiB", title="Peak resident memory of reading")
    memory.set_ylim(0, 1.15 * max(row["peak_bytes"] for row in rows) / 2**20)
    for axes in (cost, memory):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--size", default="small")
    parser.add_argument("--repeats", type=int, default=200, help="of a new event")
    parser.add_argument("--out", type=Path, help="folder for lifelong.json and lifelong.png")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_one(arguments.one, arguments.size, arguments.peers)))
        return
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, size {arguments.size}")
    rows = measure(sorted(arguments.lengths), arguments.size, arguments.repeats)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "lifelong.json").write_text(json.dumps(rows, indent=2) + "\n")
        plot(rows, arguments.out / "lifelong.png")


if __name__ == "__main__":
    main()
