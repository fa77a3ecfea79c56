"""How near our operations come to what this machine can do, on a CPU.

    python bench/roofline.py [--lengths 1024 65536] [--threads 1 2] [--dtypes float32] [--out FOLDER]

Possible is, in this very run, the smaller of two limits: the matrix multiply's rate, and the memory copy's rate times
the operation's flops per byte. Flops are those of the definition, and bytes the fewest: what must be read and written
once. Every measurement stands between two probes of the matrix multiply; ratios are taken pair by pair, and their
median is shown, so that a busy machine disturbs both alike. On a busy machine, one thread, take ``--clock processor``.

    operator   segment-causal attention, given q, k, v        layer      one summarizer layer, tile by tile
    slots      every seed's softmax over all events           summarize  events to memory, all layers: `extend`
    rank       candidates of users whose tokens are there: also candidates per second, and how the time changes when
               histories are as long as --lengths say (it should not)

With bfloat16 the model's weights and rows are bfloat16; the difference of the tokens from float32 is shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.config import resolve
from vista.models.embeddings import ItemTables
from vista.models.folding import TILE_ROWS, Buffers, LayerFold, Tile
from vista.models.inputs import Events
from vista.models.vista import SequenceModel, make_model
from vista.ops.order import SegmentOrder
from vista.ops.qla import segment_causal_qla
from vista.ops.slots import EMPTY_MAXIMUM, fold_into_slots

NUM_ITEMS = 20_000
FIRST_ITEM = 65
MINUTE_US = 60_000_000
PROBE_SHAPES = ((1_024, 1_024, 1_024), (TILE_ROWS, 128, 512))  # rows, inner, columns: square, and as a layer has it
LEAST_PROBE_S = 0.01
COPY_BYTES = 1 << 26
Row = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """Something to be measured. flops: of its definition; num_bytes: the fewest."""

    name: str
    call: Callable[[], object]
    flops: float
    num_bytes: float
    per: str = "events"
    count: int = 0


class Machine:
    """What this machine does of matrix multiplies and copies, in one number type, now."""

    def __init__(self, dtype: torch.dtype, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.products = [self._product(shape, dtype) for shape in PROBE_SHAPES]
        self.source = torch.ones(COPY_BYTES // dtype.itemsize, dtype=dtype)
        self.target = torch.empty_like(self.source)

    @staticmethod
    def _product(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        rows, inner, columns = shape
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        return lambda: torch.mm(a, b.t(), out=out), 2.0 * rows * inner * columns

    def flops_per_s(self) -> float:
        """The better of two shapes."""
        return max(flops / self.seconds(call) for call, flops in self.products)

    def bytes_per_s(self) -> float:
        """Read and written."""
        return 2 * self.source.nbytes / self.seconds(lambda: self.target.copy_(self.source))

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, the mean of as many as fill LEAST_PROBE_S."""
        started, calls = self.clock(), 0
        while not calls or self.clock() - started < LEAST_PROBE_S:
            call()
            calls += 1
        return (self.clock() - started) / calls


def measure(operation: Operation, machine: Machine, repeats: int) -> Row:
    """Medians over pairs of a probe and the operation."""
    operation.call()
    found, copies = [], machine.bytes_per_s()
    before = machine.flops_per_s()
    for _ in range(repeats):
        took_s = machine.seconds(operation.call)
        after = machine.flops_per_s()
        limit = (before + after) / 2
        possible = min(limit, copies * operation.flops / operation.num_bytes)
        rate = operation.flops / took_s
        found.append((rate / possible, rate / limit, rate, limit, operation.count / took_s))
        before = after
    shares, to_matmul, rates, limits, counts = zip(*found, strict=True)
    median = statistics.median
    return {"operation": operation.name, "achieved/possible": median(shares), "achieved/matmul": median(to_matmul),
            "spread": [min(to_matmul), max(to_matmul)], "flops_per_s": median(rates), "matmul_flops_per_s":
            median(limits), "copy_bytes_per_s": copies, "per_s": median(counts), "per": operation.per}  # fmt: skip


def build(arguments: argparse.Namespace) -> SequenceModel:
    overrides = {"model.memory": arguments.memory, "model.width": arguments.width, "model.num_layers": arguments.layers}
    overrides |= {"model.sketch_slots": 0}  # which has no matrix products
    config = resolve("base", overrides=overrides)
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(FIRST_ITEM + NUM_ITEMS, dtype=np.int32))
    torch.manual_seed(0)
    model: Any = make_model(config.model, ItemTables.of(catalogue), 1, 1, (), 0)
    for name, parameter in model.named_parameters():
        if name.endswith("unit.out.weight"):  # fresh units add nothing
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def histories(events: int, users: int) -> Events:
    total = events * users
    item = torch.randint(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS, (total,))
    times = 10**15 + torch.arange(total) * MINUTE_US
    return Events.from_log(item, torch.ones_like(item), times, torch.arange(users + 1) * events)


def layer_flops(model: SequenceModel, is_last: bool) -> float:
    """Of one event in one summarizer layer: projections, gated unit, memories."""
    c = model.config
    slots, sums = 4.0 * c.width * c.num_seeds, 4.0 * c.width * c.width / c.num_heads
    reads = slots if c.memory == "slots" else sums / 2
    if is_last:
        return 4.0 * c.width**2 + reads
    return (8.0 + 6.0 * c.expansion) * c.width**2 + sums + (slots if c.memory == "slots" else 0)


def attention_operations(model: SequenceModel, events: int, dtype: torch.dtype) -> list[Operation]:
    """The segment-causal operator and the slots, on rows that are there."""
    c, head = model.config, model.config.width // model.config.num_heads
    num_segments = events // c.segment_events
    made = (torch.randn(num_segments, c.segment_events, c.width).to(dtype) for _ in range(3))
    q, k, v = (t.unflatten(-1, (c.num_heads, head)).transpose(1, 2) for t in made)
    order = SegmentOrder.of(torch.tensor([num_segments]))
    zero = torch.zeros(1, c.num_heads, head, head)
    size = events * c.width * dtype.itemsize
    k_all, v_all = (t.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for t in (k, v))  # (1, H, N, E)
    query = torch.randn(c.num_heads, c.num_seeds, head)
    sums = torch.zeros(1, c.num_heads, c.num_seeds, head + 1, dtype=torch.float64)
    maximum = torch.full(sums.shape[:-1], EMPTY_MAXIMUM)

    def slots() -> None:
        for start in range(0, events, TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            fold_into_slots(query, k_all[:, :, rows], v_all[:, :, rows], sums, maximum)

    return [
        Operation("operator", lambda: segment_causal_qla(q, k, v, zero, order), 4.0 * events * c.width * head,
                  4 * size, count=events),
        Operation("slots", slots, 4.0 * events * c.width * c.num_seeds, 2 * size, count=events),
    ]  # fmt: skip


def model_operations(model: SequenceModel, events: int, users: int, dtype: torch.dtype) -> list[Operation]:
    """One layer over all rows, and the whole of bulk: events to memory."""
    assert model.summarizer is not None
    c, layers = model.config, list(model.summarizer.layers)
    log, total = histories(events, users), events * users
    start = model.init_state(users)
    x = torch.randn(TILE_ROWS, c.width).to(dtype)
    tile = Tile(torch.tensor([0]), torch.tensor([0]), TILE_ROWS // c.segment_events)
    fold = LayerFold(layers[0], start.memory[0], Buffers(x))  # type: ignore[arg-type]
    flops = sum(layer_flops(model, layer is layers[-1]) for layer in layers)
    row = c.width * dtype.itemsize

    def layer() -> None:
        for _ in range(max(events // TILE_ROWS, 1)):
            fold(x.clone(), tile)

    in_tiles = max(events // TILE_ROWS, 1) * TILE_ROWS
    of_one = layer_flops(model, len(layers) == 1)
    return [
        Operation("layer", layer, in_tiles * of_one, 2 * in_tiles * row, count=in_tiles),
        Operation(f"summarize, {users} users", lambda: model.extend(start, log), total * flops,
                  total * (row + 24), count=total),
    ]  # fmt: skip


def ranking(model: SequenceModel, events: int, users: int, candidates: int, dtype: torch.dtype) -> Operation:
    """Candidates of users with histories of some length, tokens and recent events being there."""
    c = model.config
    state = model.extend(model.init_state(users), histories(events, users))
    tokens = torch.randn(users, c.num_seeds, c.width).to(dtype)
    item = torch.randint(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS, (users, candidates))
    now = state.progress.last_us + MINUTE_US
    context_rows = c.num_seeds + c.recent_events
    per_block = (8.0 + 6.0 * c.expansion) * c.width**2 + 4.0 * c.width * context_rows + 4.0 * c.num_heads * c.width
    head = 2.0 * (2 * c.width + 3) * c.head_width
    flops = c.ranker_layers * (candidates * per_block + context_rows * 4.0 * c.width**2) + candidates * head
    least = (candidates + context_rows) * c.width * dtype.itemsize
    return Operation(f"rank, {users} users after {events:,} events",
                     lambda: model.rank_users(tokens, state.recent, state.progress.num_events, now, item),
                     users * flops, users * least, "candidates", users * candidates)  # fmt: skip


def flatness(operations: list[Operation], machine: Machine, repeats: int) -> float:
    """Time of ranking at the longest history divided by that at the shortest; the median of pairs."""
    pairs = [[machine.seconds(o.call) for o in (operations[0], operations[-1])] for _ in range(repeats)]
    return statistics.median(long / short for short, long in pairs)


def token_error(model: SequenceModel, dtype: torch.dtype, events: int) -> float:
    """How far the tokens are off, relative to their size, when the history was read in ``dtype``."""
    log = histories(events, 1)
    exact = model.state_tokens(model.extend(model.init_state(1), log))
    other = copy.deepcopy(model).to(dtype)
    found = model.state_tokens(other.extend(other.init_state(1), log))
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def clock_of(name: str, threads: int) -> Callable[[], float]:
    return time.perf_counter if name == "elapsed" else lambda: time.process_time() / threads


def measure_all(model: SequenceModel, dtype: torch.dtype, threads: int, arguments: argparse.Namespace) -> list[Row]:
    machine = Machine(dtype, clock_of(arguments.clock, threads))
    rows: list[Row] = []
    common = {"type": str(dtype).removeprefix("torch."), "threads": threads}
    for events in arguments.lengths:
        operations = attention_operations(model, events, dtype) + model_operations(model, events, 1, dtype)
        if events * arguments.users <= arguments.most_events:
            operations += model_operations(model, events, arguments.users, dtype)[1:]
        for operation in operations:
            rows.append(common | {"events": events} | measure(operation, machine, arguments.repeats))
            print(line(rows[-1]), flush=True)
    shortest, longest = min(arguments.lengths), max(arguments.lengths)
    ranks = [ranking(model, n, arguments.rank_users, arguments.candidates, dtype) for n in (shortest, longest)]
    rows.append(common | {"events": longest} | measure(ranks[1], machine, arguments.repeats))
    rows[-1]["time_to_shortest"] = flatness(ranks, machine, arguments.repeats)
    print(line(rows[-1]) + f" time at {longest:,} to {shortest:,} events: {rows[-1]['time_to_shortest']:.2f}")
    return rows


NAMES = (
    "operation",
    "events",
    "type",
    "threads",
    "achieved/possible",
    "achieved/matmul",
    "GF/s",
    "matmul GF/s",
    "per s",
)


def line(row: Row) -> str:
    cells = (row["operation"], f"{row['events']:,}", row["type"], row["threads"], f"{row['achieved/possible']:.2f}",
             f"{row['achieved/matmul']:.2f}", f"{row['flops_per_s'] / 1e9:.1f}",
             f"{row['matmul_flops_per_s'] / 1e9:.1f}", f"{row['per_s']:,.0f} {row['per']}")  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_024, 65_536], help="events of a history")
    parser.add_argument("--users", type=int, default=64, help="summarized at once, beside one alone")
    parser.add_argument("--most-events", type=int, default=262_144, help="of all users; more are left out")
    parser.add_argument("--rank-users", type=int, default=4, help="ranked at once")
    parser.add_argument("--candidates", type=int, default=1_000, help="of each user")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", default="slots", choices=("slots", "sum"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of probe and operation")
    parser.add_argument("--clock", default="elapsed", choices=("elapsed", "processor"))
    parser.add_argument("--out", type=Path, help="folder for roofline.json")
    arguments = parser.parse_args()
    model, rows, errors = build(arguments), [], {}
    print("| " + " | ".join(NAMES) + " |\n" + "|---" * len(NAMES) + "|")
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        cast = copy.deepcopy(model).to(dtype)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rows += measure_all(cast, dtype, threads, arguments)
        if dtype != torch.float32:
            errors[name] = token_error(model, dtype, min(arguments.lengths))
            print(f"tokens of {min(arguments.lengths):,} events read in {name} are off by {errors[name]:.1e}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = {"capability": torch.backends.cpu.get_cpu_capability(), "memory": arguments.memory, "rows": rows,
                 "token_error": errors}  # fmt: skip
        (arguments.out / "roofline.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
