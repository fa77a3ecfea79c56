"""``hstu``: pointwise attention with a gate, after Zhai et al. 2024, "Actions Speak Louder than Words".

Paper, equations 1 to 3, per layer, with phi = SiLU and rab the bias by relative position p and time t:

    U, V, Q, K = split(phi(f_1(norm(x))))
    A(x) V     = phi(Q K^T + rab^(p, t)) V / N       pointwise: no softmax, so that intensity is kept
    y          = x + f_2(norm(A(x) V) * U)           norm: LayerNorm without weights

A candidate is one more row behind the history (the paper's target-aware ranking): it attends to the events and to
itself, and no candidate to another (the paper's mask of micro-batches). Since history rows never see candidates, their
keys and values are made once for all candidates.

N is ``history_events``. rab has a value per head for each distance up to N and for each bucket of log2 seconds, of its
own in each layer, as in the authors' code.

Ours: actions are part of an event's vector, where the paper interleaves item and action rows. A candidate's row is its
item vector plus a learned one that marks it as a candidate, and the bias also tells it which events are of its own
item. Beside it, the parts named in ``base``.

Shape letters: B lanes or requests, n rows of each, Q requests, C candidates, R raw events, D width, H heads, E head
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from vista.config import ModelConfig
from vista.models.baselines.base import Rows, Window, match, take, weigh
from vista.models.baselines.causal import Block, CausalBaseline, Stretches, attend_in_blocks
from vista.models.batch import Requests
from vista.models.embeddings import GAP_BUCKETS
from vista.models.layers import join_heads, norm, small_lookup, split_heads
from vista.models.ranker import SAME_ITEM_LOGIT

NORM_EPSILON = 1e-6  # of LayerNorm, the authors'
AT_ONCE = 1  # the bucket of a difference of no time


class HSTULayer(nn.Module):
    """One layer, for history rows and for candidates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.into = nn.Linear(config.width, 4 * config.width)  # f_1
        self.out = nn.Linear(config.width, config.width)  # f_2
        self.distance = nn.Embedding(config.history_events + 1, config.num_heads)  # rab^p
        self.time = nn.Embedding(GAP_BUCKETS, config.num_heads)  # rab^t
        self.same_item = nn.Parameter(torch.full((config.num_heads,), SAME_ITEM_LOGIT))
        nn.init.normal_(self.distance.weight, std=0.02)
        nn.init.normal_(self.time.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., n, D) to U, V, Q, K, (..., n, D) each."""
        u, v, q, k = silu(self.into(_layer_norm(x))).chunk(4, -1)
        return u, v, q, k

    def finish(self, x: Tensor, attended: Tensor, u: Tensor) -> Tensor:
        """x + f_2(norm(attended) * U)."""
        return x + self.dropout(self.out(_layer_norm(attended) * u))

    def forward(self, x: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor], of: Stretches, first: int = 0) -> Tensor:
        """History rows (B, n, D) with their U, V, Q, K, to the next layer's from ``first`` on, (B, n - first, D)."""
        u, v, q, k = parts[0], *(split_heads(t, self.config.num_heads) for t in parts[1:])

        def attend(block: Block) -> Tensor:
            logits = q[:, :, block.rows] @ k[:, :, block.keys].transpose(-2, -1)
            by_time = small_lookup(self.time.weight, block.time_bucket)
            logits = logits + (small_lookup(self.distance.weight, block.distance)[:, None] + by_time).transpose(0, 1)
            return self._weigh(logits, block.is_seen).to(v.dtype) @ v[:, :, block.keys]

        return self.finish(x[:, first:], join_heads(attend_in_blocks(attend, of, first)), u[:, first:])

    def read(self, x: Tensor, history: tuple[Tensor, Tensor], window: Window, is_same: Tensor) -> Tensor:
        """Candidate rows (Q, C, D) to the next layer's.

        history: values and keys of a window's events, (W, D), or (Q, R, D) where each request has its own; is_same
        (Q, C, W).
        """
        heads = self.config.num_heads
        u, *own = self.split(x)
        v, q, k = (split_heads(t, heads).transpose(0, 1) for t in own)  # (H, Q, C, E)
        history_v, history_k = (split_heads(t, heads) for t in history)
        if history_v.ndim == 4:  # (Q, H, R, E)
            history_v, history_k = history_v.transpose(0, 1), history_k.transpose(0, 1)
        place = window.place.clamp(0, self.config.history_events)
        bias = small_lookup(self.distance.weight, place) + small_lookup(self.time.weight, window.age_bucket)
        logits = match(q, history_k) + bias[:, :, None] + is_same * self.same_item[:, None, None, None]
        weight = self._weigh(logits, window.is_there[:, None])
        on_self = (q * k).sum(-1, keepdim=True) + (self.distance.weight[0] + self.time.weight[AT_ONCE])[
            :, None, None, None
        ]
        attended = weigh(weight.to(v.dtype), history_v)
        attended = attended + self._weigh(on_self, torch.ones_like(on_self)).to(v.dtype) * v
        return self.finish(x, attended.permute(1, 2, 0, 3).flatten(2), u)

    def _weigh(self, logits: Tensor, is_seen: Tensor) -> Tensor:
        return silu(logits) * is_seen / self.config.history_events


def encode_rows(layers: Sequence[HSTULayer], x: Tensor, of: Stretches, first: int = 0) -> Tensor:
    """Event vectors (B, n, D) through all layers, the rows from ``first`` on: (B, n - first, D)."""
    for layer in layers[:-1]:
        x = layer(x, layer.split(x), of)
    return layers[-1](x, layers[-1].split(x), of, first)


def _layer_norm(x: Tensor) -> Tensor:
    return layer_norm(x, (x.shape[-1],), eps=NORM_EPSILON)


class HSTU(CausalBaseline):
    """Cost of a request: encoding R rows, R^2 D per layer but the last; then C x R x D per layer."""

    def build(self) -> None:
        self.read_width = self.config.width
        self.layers = nn.ModuleList(HSTULayer(self.config) for _ in range(self.config.encoder_layers))
        self.target = nn.Parameter(0.1 * torch.randn(self.config.width))

    def encode(self, x: Tensor, of: Stretches) -> Rows:
        """Values and keys of each layer, in turn. The last layer's output is read by nobody and not made."""
        rows: list[Tensor] = []
        for depth, layer in enumerate(self._layers):
            parts = layer.split(x)
            rows += [parts[1], parts[3]]
            if depth + 1 < len(self._layers):
                x = layer(x, parts, of)
        return tuple(rows)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        if self.training:
            window = Window.of(requests)
            return self._read_encoded(tuple(r[window.rows] for r in rows), window, requests, candidate_x)
        of = Stretches(requests.recent_us, requests.recent >= 0, self.config.history_events)
        encoded = self.encode(take(rows[0], requests.recent), of)
        return self._read_encoded(encoded, Window.own(requests), requests, candidate_x)

    def _read_encoded(self, rows: Rows, window: Window, requests: Requests, candidate_x: Tensor) -> Tensor:
        x, is_same = candidate_x + self.target, window.is_same_item(requests)
        for depth, layer in enumerate(self._layers):
            x = layer.read(x, (rows[2 * depth], rows[2 * depth + 1]), window, is_same)
        return norm(x)

    def numbers(self, num_candidates: int, num_events: int) -> int:
        reading = num_candidates * len(self.layers) * (self.config.num_heads + 1) * num_events
        if self.training:
            return reading
        kept = 2 * len(self.layers) * num_events * self.config.width
        return reading + kept + self.numbers_of_encoding(num_events)

    @property
    def _layers(self) -> list[HSTULayer]:
        return list(self.layers)  # type: ignore[arg-type]
