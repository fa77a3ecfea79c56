"""One layer over one history: ours beside the field's, forward and with gradients, on a CPU.

    python bench/peers.py [--lengths 1024 4096 16384 65536] [--budget 20] [--hstu-path FOLDER] [--out FOLDER]

Shared by all: one user, rows of ``--width`` numbers in ``--heads`` heads, float32. Ours is the summarizer's layer: both
memories, and forward as bulk runs it (without gradients, in tiles) and as training does. A peer that is not installed
is left out with a line; its package is named there. Pairs: ours and the peer alternate, and the median of the ratios
is shown. A peer's longest length is where one call took more than ``--budget`` seconds: it goes no further, and the
ratio beyond is the one that its last two lengths promise, marked with ~.

    softmax    torch's causal scaled_dot_product_attention
    hstu       `vista.models.baselines.hstu`, attention over the whole history (its reach is the length)
    meta-hstu  the authors' SequentialTransductionUnitJagged, from a checkout of generative-recommenders (--hstu-path)
    performer, linear-transformer    their packages' causal attention
    fla        flash-linear-attention's reference of chunked linear attention in torch
    mamba      the block of transformers

Attention alone (softmax, performer, linear-transformer, fla) gets the norms and the gated unit of our layer; hstu and
mamba are blocks with gates of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vista.config import ModelConfig
from vista.models.baselines.causal import Stretches
from vista.models.baselines.hstu import HSTULayer
from vista.models.folding import TILE_ROWS, Buffers, LayerFold, Tile
from vista.models.layers import GatedUnit, aligned, join_heads, norm, split_heads
from vista.models.summarizer import SummarizerLayer
from vista.ops.order import SegmentOrder

SECOND_US = 1_000_000
Call = Callable[[Tensor], Tensor]  # rows (N, D) to rows (N, D)
Row = dict[str, Any]


class Ours:
    """The summarizer's layer: in tiles without gradients, as a whole with them."""

    def __init__(self, memory: str, arguments: argparse.Namespace) -> None:
        self.config = ModelConfig(memory=memory, width=arguments.width, num_heads=arguments.heads, segment_events=128)
        self.layer = SummarizerLayer(self.config, is_first=True, is_last=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x) if torch.is_grad_enabled() else self.in_tiles(x)

    def in_tiles(self, x: Tensor) -> Tensor:
        fold, out = LayerFold(self.layer, self.layer.initial(1), Buffers(x)), x.clone()
        for rows in out.split(TILE_ROWS):
            fold(rows, Tile(torch.tensor([0]), torch.tensor([0]), len(rows) // self.config.segment_events))
        return out

    def whole(self, x: Tensor) -> Tensor:
        segments = x.unflatten(0, (-1, self.config.segment_events))
        is_valid = torch.ones(segments.shape[:2], dtype=torch.bool)
        order = SegmentOrder.of(torch.tensor([len(segments)]))
        rows = self.layer.fold(segments, is_valid, order, self.layer.initial(1))[0]
        assert rows is not None
        return rows.flatten(0, 1)


class Layer(nn.Module):
    """A peer's attention where ours stands: x + attention(norm(x)), then the gated unit that ours has."""

    def __init__(self, width: int, attention: Call) -> None:
        super().__init__()
        self.attention, self.unit = attention, GatedUnit(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit.added(x + self.attention(norm(x)))


class Projected(nn.Module):
    """Attention of heads (1, H, N, E) between projections."""

    def __init__(self, width: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.query, self.key, self.value, self.out = (aligned(width) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (split_heads(p(h)[None], self.heads) for p in (self.query, self.key, self.value))
        return self.out(join_heads(self.attend(q, k, v)))[0]


def ours(memory: str) -> Callable[[argparse.Namespace, int], Call]:
    return lambda arguments, events: Ours(memory, arguments)


def softmax(arguments: argparse.Namespace, events: int) -> Call:
    attend = partial(scaled_dot_product_attention, is_causal=True)
    return Layer(arguments.width, Projected(arguments.width, arguments.heads, attend))


def hstu(arguments: argparse.Namespace, events: int) -> Call:
    layer = HSTULayer(ModelConfig(width=arguments.width, num_heads=arguments.heads, history_events=events))
    times = torch.arange(events)[None] * SECOND_US
    of = Stretches(times, torch.ones(1, events, dtype=torch.bool), events)
    return lambda x: layer(x[None], layer.split(x[None]), of)[0]


def meta_hstu(arguments: argparse.Namespace, events: int) -> Call:
    if arguments.hstu_path is None:
        raise ImportError("give a checkout of generative-recommenders by --hstu-path")
    sys.path.insert(0, str(arguments.hstu_path))
    found = importlib.import_module("generative_recommenders.research.modeling.sequential.hstu")
    head = arguments.width // arguments.heads
    layer = found.SequentialTransductionUnitJagged(
        embedding_dim=arguments.width, linear_hidden_dim=head, attention_dim=head, dropout_ratio=0.0,
        attn_dropout_ratio=0.0, num_heads=arguments.heads, linear_activation="silu",
        relative_attention_bias_module=None,
    )  # fmt: skip
    offsets, mask = torch.tensor([0, events]), torch.tril(torch.ones(events, events))
    return lambda x: layer(x, offsets, None, mask, None)[0]


def performer(arguments: argparse.Namespace, events: int) -> Call:
    found = importlib.import_module("performer_pytorch")
    head = arguments.width // arguments.heads
    layer = found.SelfAttention(dim=arguments.width, heads=arguments.heads, dim_head=head, causal=True)
    return Layer(arguments.width, lambda h: layer(h[None])[0])


def linear_transformer(arguments: argparse.Namespace, events: int) -> Call:
    found = importlib.import_module("linear_attention_transformer.linear_attention_transformer")
    layer = found.SelfAttention(arguments.width, arguments.heads, causal=True, blindspot_size=64)
    return Layer(arguments.width, lambda h: layer(h[None])[0])


def mamba(arguments: argparse.Namespace, events: int) -> Call:
    found = importlib.import_module("transformers.models.mamba.modeling_mamba")
    config = found.MambaConfig(hidden_size=arguments.width, num_hidden_layers=1, use_cache=False)
    layer = found.MambaMixer(config, layer_idx=0)
    return lambda x: layer(x[None])[0]


def fla(arguments: argparse.Namespace, events: int) -> Call:
    naive = importlib.import_module("fla.ops.linear_attn.naive").naive_chunk_linear_attn
    by_event = (1, 2)  # it has heads (1, N, H, E)

    def attend(*heads: Tensor) -> Tensor:
        return naive(*(t.transpose(*by_event) for t in heads), normalize=False).transpose(*by_event)

    return Layer(arguments.width, Projected(arguments.width, arguments.heads, attend))


PEERS: dict[str, Callable[[argparse.Namespace, int], Call]] = {
    "softmax": softmax, "hstu": hstu, "meta-hstu": meta_hstu, "performer": performer,
    "linear-transformer": linear_transformer, "mamba": mamba, "fla": fla,
}  # fmt: skip
LONGEST_PAIR_BYTES = {"meta-hstu": 4, "fla": 0}  # bytes of each pair of events that are kept at once
MOST_BYTES = 2**31


def seconds(call: Call, x: Tensor, with_gradients: bool) -> float:
    """Of one call; with gradients, forward and backward."""
    started = time.process_time()
    if with_gradients:
        call(x).square().mean().backward()
    else:
        with torch.no_grad():
            call(x)
    return (time.process_time() - started) / torch.get_num_threads()


def compare(mine: Call, theirs: Call, x: Tensor, with_gradients: bool, arguments: argparse.Namespace) -> Row:
    """Medians of our seconds, theirs and of the ratio over pairs; one pair where a call takes more than a second."""
    pairs: list[tuple[float, float]] = []
    while len(pairs) < arguments.repeats + 1 and not any(b > 1 for _, b in pairs):
        pairs.append((seconds(mine, x, with_gradients), seconds(theirs, x, with_gradients)))
    kept = pairs[1:] or pairs  # the first one warms up
    ratio = statistics.median(b / a for a, b in kept)
    return {"ours_s": statistics.median(a for a, _ in kept), "theirs_s": statistics.median(b for _, b in kept),
            "ratio": ratio}  # fmt: skip


def promised(measured: list[Row], events: int) -> float | None:
    """The ratio at a length beyond a peer's last: the power law through its last two."""
    if len(measured) < 2:
        return None
    a, b = measured[-2:]
    power = math.log(b["ratio"] / a["ratio"]) / math.log(b["events"] / a["events"])
    return b["ratio"] * (events / b["events"]) ** power


def measure(name: str, memory: str, with_gradients: bool, arguments: argparse.Namespace) -> list[Row]:
    """One peer at growing lengths. Raises ImportError where it is not installed."""
    rows: list[Row] = []
    common = {"peer": name, "memory": memory, "gradients": with_gradients}
    is_too_slow = False
    for events in sorted(arguments.lengths):
        too_large = LONGEST_PAIR_BYTES.get(name, 0) * events**2 > MOST_BYTES
        if is_too_slow or too_large:
            ratio = promised([r for r in rows if not r["is_promised"]], events)
            rows += [] if ratio is None else [common | {"events": events, "ratio": ratio, "is_promised": True}]
            continue
        x = torch.randn(events, arguments.width, requires_grad=with_gradients)
        found = compare(ours(memory)(arguments, events), PEERS[name](arguments, events), x, with_gradients, arguments)
        rows.append(common | {"events": events, "is_promised": False} | found)
        growth = max(arguments.lengths) / events  # a length more costs four times at most where it costs twice
        is_too_slow = found["theirs_s"] * 4 > arguments.budget and growth > 1
    return rows


def line(rows: list[Row], arguments: argparse.Namespace) -> str:
    by_length = {r["events"]: f"{'~' if r['is_promised'] else ''}{r['ratio']:,.1f}" for r in rows}
    cells = [by_length.get(n, "-") for n in sorted(arguments.lengths)]
    kind = "forward + backward" if rows[0]["gradients"] else "forward"
    return f"| {rows[0]['peer']} | {rows[0]['memory']} | {kind} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_024, 4_096, 16_384, 65_536])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--memories", nargs="+", default=["slots", "sum"], choices=("slots", "sum"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="pairs")
    parser.add_argument("--budget", type=float, default=20, help="seconds that one call of a peer may take")
    parser.add_argument("--hstu-path", type=Path, help="a checkout of generative-recommenders")
    parser.add_argument("--out", type=Path, help="folder for peers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [f"{n:,}" for n in sorted(arguments.lengths)]
    print(f"how many times as long as ours the peer takes, at so many events\n\n| peer | our memory | | "
          f"{' | '.join(lengths)} |\n{'|---' * (3 + len(lengths))}|")  # fmt: skip
    found: list[Row] = []
    for name in arguments.peers:
        for memory, gradients in ((m, g) for m in arguments.memories for g in (False, True)):
            try:
                rows = measure(name, memory, gradients, arguments)
            except ImportError as error:
                print(f"left out: {name} ({error})", flush=True)
                break
            found += rows
            print(line(rows, arguments), flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "peers.json").write_text(json.dumps({"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
