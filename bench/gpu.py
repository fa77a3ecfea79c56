"""What our operators reach on one GPU: one call, under ten minutes, a Markdown table and JSON.

    python bench/gpu.py [--out FOLDER] [--budget 480]
    python bench/gpu.py --device cpu --tiny

First every kernel is held to torch on the device itself, values and gradients; a difference ends the call. Then, from a
thousand to a million events, of one user and of many, in bfloat16: our two memories on kernels and in plain torch,
torch's causal softmax attention, and flash-linear-attention where it is installed; with the share of the
memory bandwidth and of the matrix rate that this very device shows. First of all, a whole model: reading histories,
the same with gradients, and steps of training.
Where the budget (seconds) is used up, rows are left out and named. A CPU runs the same code in torch alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vista.catalogue import Catalogue
from vista.config import Config, ModelConfig, resolve
from vista.models.batch import Borders, Requests, TimelineBatch
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events, Progress, newest_index
from vista.models.losses import multi_task_loss
from vista.models.vista import make_model
from vista.ops.forms import kernels_on, why_torch
from vista.ops.order import SegmentOrder
from vista.ops.qla import rms_norm, segment_causal_qla
from vista.ops.slots import EMPTY_MAXIMUM, scan_slots, slot_parts

HEADS, WIDTH, SEGMENT, SEEDS, NUM_ITEMS = 4, 32, 128, 128, 20_000
REQUESTS, CANDIDATES = 16, 8  # of each user in a step of training
TRAINED_EVENTS = 1_024  # of each user in a step of training
LENGTHS = (1_024, 16_384, 131_072, 1_048_576)
USERS = (1, 64)
MOST_EVENTS = 1_048_576  # of all users together
MOST_SOFTMAX = 131_072  # events: beyond, one product alone takes longer than everything else here
REPEATS = 5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest number
Row = dict[str, Any]


def seconds(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The median of some calls, after one that compiles and warms up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def limits(device: str, tiny: bool) -> tuple[float, float]:
    """What this device shows: bytes/s of a copy (read and written), and bfloat16 flops/s of a square product."""
    size = 512 if tiny else 8_192
    square = torch.randn(size, size, device=device).to(torch.bfloat16)
    target = torch.empty_like(square)
    copy_s = seconds(lambda: target.copy_(square), device)
    return 2 * square.nbytes / copy_s, 2 * size**3 / seconds(lambda: square @ square, device)


def rows(num_segments: int, device: str, dtype: torch.dtype, num: int) -> list[Tensor]:
    """(G, H, S, E) each, a view of rows with heads inside, as the model has them."""
    made = (torch.randn(num_segments, SEGMENT, HEADS * WIDTH, device=device).to(dtype) for _ in range(num))
    return [t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2).requires_grad_() for t in made]


class Case:
    """One operator on the histories of some users: what is run, its fewest bytes, and its flops."""

    def __init__(self, name: str, users: int, events: int, device: str, dtype: torch.dtype) -> None:
        per_user = events // users // SEGMENT
        self.order = SegmentOrder.of(torch.full((users,), per_user))
        num = users * per_user
        self.q, self.k, self.v = rows(num, device, dtype, 3)
        self.name, row_bytes = name, 2 * num * SEGMENT * HEADS * WIDTH * self.q.element_size()
        if name == "sum":
            self.start: tuple[Tensor, ...] = (torch.zeros(users, HEADS, WIDTH, WIDTH, device=device),)
            self.bytes, self.flops = 2 * row_bytes, 4 * num * SEGMENT * HEADS * WIDTH**2  # q, k, v read, o written
        else:
            shape = (users, HEADS, SEEDS)
            sums = torch.zeros(*shape, WIDTH + 1, device=device)
            residue = torch.zeros_like(sums, dtype=torch.int8)
            self.start = sums, torch.full(shape, EMPTY_MAXIMUM, device=device), residue
            self.query = torch.randn(HEADS, SEEDS, WIDTH, device=device, requires_grad=True)
            self.is_valid = torch.ones(num, SEGMENT, dtype=torch.bool, device=device)
            self.bytes, self.flops = row_bytes, 4 * num * SEGMENT * HEADS * WIDTH * SEEDS  # k, v read

    def __call__(self) -> Tensor:
        if self.name == "sum":
            return segment_causal_qla(self.q, self.k, self.v, self.start[0], self.order, rms_norm)[0]
        parts = slot_parts(self.query, self.k, self.v, self.is_valid)
        return scan_slots(self.order, self.start, parts)[0][0]

    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v] if self.name == "sum" else [self.query, self.k, self.v]

    def with_gradients(self) -> list[Tensor]:
        out = self()
        return [out.detach(), *torch.autograd.grad(out.sum(), self.inputs())]


def check(device: str) -> list[Row]:
    """Kernels against torch on this device. Raises SystemExit where they differ."""
    found = []
    for name in ("sum", "slots"):
        for dtype, tolerance in TOLERANCE.items():
            case = Case(name, 2, 6 * SEGMENT, device, dtype)
            mine = case.with_gradients()
            with kernels_on():
                theirs = case.with_gradients()
            error = max(float((a - b).float().abs().max() / b.float().abs().max())
                        for a, b in zip(mine, theirs, strict=True))  # fmt: skip
            found.append({"operator": name, "type": str(dtype), "error": error})
            if not error < tolerance:
                raise SystemExit(f"error: {name} in {dtype} differs from torch by {error:.1e}, allowed {tolerance:.0e}")
    return found


def softmax(users: int, events: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    q, k, v = (torch.randn(users, HEADS, events // users, WIDTH, device=device).to(dtype) for _ in range(3))
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


def linear_attention(users: int, events: int, device: str, dtype: torch.dtype) -> Callable[[], object] | None:
    """flash-linear-attention's causal chunked form, or None where it is not installed."""
    try:
        peer = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    except ImportError:
        return None
    q, k, v = (torch.randn(users, events // users, HEADS, WIDTH, device=device).to(dtype) for _ in range(3))
    return lambda: peer(q, k, v, normalize=False)


def measure_operators(device: str, lengths: tuple[int, ...], rate: tuple[float, float], until: float) -> list[Row]:
    found = []
    sizes = [(u, n) for n in lengths for u in USERS if u * SEGMENT <= n <= MOST_EVENTS]
    for users, events in sizes:
        if time.monotonic() > until:
            found.append({"operator": "left out: budget used up", "users": users, "events": events})
            continue
        for name in ("sum", "slots"):
            case = Case(name, users, events, device, torch.bfloat16)
            for form in ("kernels", "torch") if device == "cuda" and not why_torch() else ("torch",):
                with kernels_on(*(["cuda"] if form == "kernels" else [])):
                    with torch.no_grad():
                        forward_s = seconds(case, device)
                    both_s = seconds(case.with_gradients, device)
                row = {"operator": name, "form": form, "users": users, "events": events, "forward_s": forward_s}
                shares = {
                    "bandwidth": case.bytes / forward_s / rate[0],
                    "matrix_rate": case.flops / forward_s / rate[1],
                }
                found.append(row | {"with_backward_s": both_s} | shares)
            del case
        peers = {"fla": linear_attention(users, events, device, torch.bfloat16) if device == "cuda" else None}
        if events // users <= MOST_SOFTMAX:
            peers["softmax"] = softmax(users, events, device, torch.bfloat16)
        for name, call in peers.items():
            if call is not None:
                row = {"operator": name, "form": "peer", "users": users, "events": events}
                found.append(row | {"forward_s": seconds(call, device, 3)})
    return found


def made_log(users: int, events: int) -> Events:
    """Histories of ``users`` with so many events each."""
    total = users * events
    times = 10**15 + torch.arange(total) * 60_000_000
    item = torch.randint(65, 65 + NUM_ITEMS, (total,))
    return Events.from_log(item, torch.ones_like(item), times, torch.arange(users + 1) * events)


def made_batch(config: ModelConfig, users: int, events: int, requests: int) -> TimelineBatch:
    """A step of training: whole histories, with so many requests of each user, reading borders all along them."""
    size, log = config.segment_events, made_log(users, events)
    num_segments, place = events // size, torch.arange(users * events // size * size)
    segment = place.view(-1, size) + (events % size) * (place.view(-1, size) // (num_segments * size))
    lane = torch.arange(users).repeat_interleave(requests)
    closed = torch.linspace(1, num_segments, requests).long().repeat(users)
    known = closed * size
    end = log.offsets[lane] + known
    first, last = log.timestamp_us[log.offsets[lane]], log.timestamp_us[end - 1]
    recent = newest_index(end, known.clamp(max=config.raw_events), config.raw_events)
    candidate = torch.randint(65, 65 + NUM_ITEMS, (len(lane), CANDIDATES))
    asked = Requests(
        torch.arange(len(lane)), recent, log.item[recent.clamp(min=0)] * (recent >= 0),
        log.timestamp_us[recent.clamp(min=0)], last + 1, known, candidate, torch.zeros(*candidate.shape, 0),
    )  # fmt: skip
    borders = Borders(users + lane * num_segments + closed - 1, Progress(known, first, last), lane)
    label = torch.randint(0, 2, (*candidate.shape, 1)).float()
    shown = torch.arange(candidate.numel()).view_as(candidate)
    return TimelineBatch(log, segment, torch.full((users,), num_segments), borders, asked, label, shown)


def measure_model(device: str, events: int, users: int, has_sketch: bool) -> list[Row]:
    """Size base, events/s: summaries of whole histories; the same with gradients; and steps of training, with the
    ranker, its candidates and the optimizer. A sketch is taken in by the CPU, whatever the device."""
    config: Config = resolve("base", overrides={} if has_sketch else {"model.sketch_slots": 0})
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(65 + NUM_ITEMS, dtype=np.int32))
    torch.manual_seed(0)
    model: Any = make_model(config.model, ItemTables.of(catalogue), 1, 1, (), 0).to(device)
    total, log = users * events, made_log(users, events).to(device)
    batch = made_batch(config.model, users, min(events, TRAINED_EVENTS), REQUESTS).to(device)
    sparse = [model.embedding.items.rows.weight]
    dense = [p for p in model.parameters() if p is not sparse[0]]
    optimizers = [torch.optim.AdamW(dense), torch.optim.SparseAdam(sparse)]

    def summarize() -> None:
        with torch.no_grad():
            model.state_tokens(model.extend(model.init_state(users), log))

    def with_gradients() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            tokens = model.state_tokens(model.extend(model.init_state(users), log))
        tokens.float().square().mean().backward()

    def train_step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            output = model(batch, model.init_memory(users))
        multi_task_loss(output.logits, batch.label, batch.is_valid).backward()
        for optimizer in optimizers:
            optimizer.step()

    calls = {"summarize": (summarize, total), "summarize, with gradients": (with_gradients, total),
             "train": (train_step, len(batch.events.item))}  # fmt: skip
    found = []
    for form in ("kernels", "torch") if device == "cuda" and not why_torch() else ("torch",):
        with kernels_on(*(["cuda"] if form == "kernels" else [])):
            for name, (call, read) in calls.items():
                row = {"operator": name + ("" if has_sketch else ", no sketch"), "form": form, "users": users}
                elapsed_s = seconds(call, device, 3)
                row |= {"events": read, "events_per_s": read / elapsed_s}
                found.append(row | ({"impressions_per_s": batch.label.numel() / elapsed_s} if name == "train" else {}))
    return found


def table(found: list[Row]) -> str:
    names = ["operator", "form", "users", "events", "forward_s", "with_backward_s", "bandwidth", "matrix_rate",
             "events_per_s", "impressions_per_s"]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in found:
        cells = [f"{v:,.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
                 for v in (row.get(name, "") for name in names)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the same code on a few events")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further size is begun")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny or arguments.device == "cpu"
    until = time.monotonic() + arguments.budget
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    forms = "kernels" if device == "cuda" and not why_torch() else f"torch ({why_torch() or 'on a CPU'})"
    print(f"{name}, torch {torch.__version__}, operators: {forms}", flush=True)
    checked = check(device)
    rate = limits(device, tiny)
    print(f"copy {rate[0] / 1e9:,.0f} GB/s, bfloat16 product {rate[1] / 1e12:,.3f} TF/s", flush=True)
    found = []
    for has_sketch in (False, True):
        found += measure_model(device, *((384, 2) if tiny else (16_384, 64)), has_sketch)  # compiles longest: first
    found += measure_operators(device, (LENGTHS[0] // 2,) if tiny else LENGTHS, rate, until)
    print(table(found))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = {"device": name, "bytes_per_s": rate[0], "flops_per_s": rate[1], "checked": checked, "rows": found}
        (arguments.out / "gpu.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
