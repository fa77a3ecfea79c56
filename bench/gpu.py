"""What our operators reach on one GPU: one call, under ten minutes, a Markdown table and JSON.

    python bench/gpu.py [--out FOLDER] [--budget 480]
    python bench/gpu.py --device cpu --tiny

First every kernel is held to torch on the device itself, values and gradients; a difference ends the call. Then, from a
thousand to a million events, of one user and of many, in bfloat16: our two memories on kernels and in plain torch,
torch's causal softmax attention, and flash-linear-attention where it is installed; with the share of the
memory bandwidth and of the matrix rate that this very device shows. Last, a whole summarizer: reading, and reading with
gradients.
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
from vista.config import Config, resolve
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events
from vista.models.vista import make_model
from vista.ops.forms import kernels_on, why_torch
from vista.ops.order import SegmentOrder
from vista.ops.qla import rms_norm, segment_causal_qla
from vista.ops.slots import EMPTY_MAXIMUM, scan_slots, slot_parts

HEADS, WIDTH, SEGMENT, SEEDS, NUM_ITEMS = 4, 32, 128, 128, 20_000
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


def measure_model(device: str, events: int, users: int) -> list[Row]:
    """Size base, events/s: summaries of whole histories, and the same with gradients (no ranker, no optimizer)."""
    config: Config = resolve("base")
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(65 + NUM_ITEMS, dtype=np.int32))
    torch.manual_seed(0)
    model: Any = make_model(config.model, ItemTables.of(catalogue), 1, 1, (), 0).to(device)
    total = users * events
    times = 10**15 + torch.arange(total) * 60_000_000
    item = torch.randint(65, 65 + NUM_ITEMS, (total,))
    log = Events.from_log(item, torch.ones_like(item), times, torch.arange(users + 1) * events).to(device)

    def summarize() -> None:
        with torch.no_grad():
            model.state_tokens(model.extend(model.init_state(users), log))

    def with_gradients() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            tokens = model.state_tokens(model.extend(model.init_state(users), log))
        tokens.float().square().mean().backward()

    found = []
    for form in ("kernels", "torch") if device == "cuda" and not why_torch() else ("torch",):
        with kernels_on(*(["cuda"] if form == "kernels" else [])):
            for name, call in (("summarize", summarize), ("summarize, with gradients", with_gradients)):
                row = {"operator": name, "form": form, "users": users, "events": total}
                found.append(row | {"events_per_s": total / seconds(call, device, 3)})
    return found


def table(found: list[Row]) -> str:
    names = ["operator", "form", "users", "events", "forward_s", "with_backward_s", "bandwidth", "matrix_rate",
             "events_per_s"]  # fmt: skip
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
    found = measure_model(device, *((256, 2) if tiny else (16_384, 64)))  # the longest compilation first
    found += measure_operators(device, (LENGTHS[0] // 2,) if tiny else LENGTHS, rate, until)
    print(table(found))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = {"device": name, "bytes_per_s": rate[0], "flops_per_s": rate[1], "checked": checked, "rows": found}
        (arguments.out / "gpu.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
