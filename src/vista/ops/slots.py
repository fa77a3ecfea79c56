"""Slots: a softmax over all events for each of K constant queries, kept as running sums.

    weight_n = exp(q . k_n / sqrt(E) - m), m the largest logit so far
    sums     = (sum of weight_n v_n, sum of weight_n)       numerator (E) and denominator (1), always summed together

A segment's part is (sums, m) of its own events; merging two rescales both to the larger maximum and adds. The naive
form is the definition, the other the one models use: on a GPU it runs `vista.ops.triton_slots` and
`vista.ops.triton_scan`, on a CPU `vista.ops.tiled`. Values and gradients of all are equal (tests/ops).

Shape letters: B users, G segments (of all users together), S rows of a segment, H heads, E head width, K seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.ops import tiled
from vista.ops.forms import uses_kernels, uses_tiles
from vista.ops.order import SegmentOrder
from vista.ops.qla import add_compensated, carried

EMPTY_MAXIMUM = -1e30  # stands for minus infinity, whose differences would be NaN
Values = tuple[Tensor, ...]


def slot_reads_naive(query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one head: query (K, E), k, v (N, E), to softmax-weighted values (K, E) and log-sum-exps (K,)."""
    logits = torch.stack([(query * key).sum(-1) * query.shape[-1] ** -0.5 for key in k], -1)
    weights = logits.softmax(-1)
    reads = [sum((w * value for w, value in zip(row, v, strict=True)), torch.zeros_like(v[0])) for row in weights]
    return torch.stack(reads), logits.logsumexp(-1)


def slot_parts(query: Tensor, k: Tensor, v: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of segments: query (H, K, E), k, v (G, H, S, E), is_valid (G, S), to sums (G, H, K, E + 1) and maxima
    (G, H, K), both `carried`. No gradient flows through maxima: they cancel."""
    if uses_kernels(k, v):
        from vista.ops.triton_slots import SlotParts

        return SlotParts.apply(query, k, v, is_valid)
    if uses_tiles(k, v):
        return tiled.SlotParts.apply(query, k, v, is_valid, EMPTY_MAXIMUM)
    logits = carried(query.to(k.dtype) @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
    logits = logits.masked_fill(~is_valid[:, None, None, :], EMPTY_MAXIMUM)
    maximum = logits.amax(-1)
    weight = (logits - maximum.detach()[..., None]).exp() * is_valid[:, None, None, :]
    sums = torch.cat([carried(weight.to(v.dtype) @ v), weight.sum(-1, keepdim=True)], -1)
    return sums, maximum.detach()


def slot_shares(query: Tensor, k: Tensor, sums: Tensor, maximum: Tensor) -> Tensor:
    """The softmax weight of rows among all that sums (..., H, K, E + 1) and maximum (..., H, K) hold.

    query (H, K, E), k (..., H, S, E), to (..., H, K, S).
    """
    logits = carried(query.to(k.dtype) @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
    return (logits - maximum[..., None]).exp() / sums[..., -1:]


def merge_slots(running: Values, part: Values) -> Values:
    """The running value (sums, maximum, residue) after one more part (sums, maximum)."""
    maximum = torch.maximum(running[1], part[1])
    old, new = (running[1] - maximum).exp()[..., None], (part[1] - maximum).exp()[..., None]
    sums, residue = add_compensated(running[0], running[2], part[0] * new, old)
    return sums, maximum, residue


def scan_slots(order: SegmentOrder, running: Values, parts: Values) -> tuple[Values, Values]:
    """``order.scan`` of `merge_slots`."""
    if uses_kernels(parts[0]):
        from vista.ops.triton_scan import scan

        return scan(order, running, parts)
    if uses_tiles(parts[0]):
        return tiled.scan(order, merge_slots, running, parts)
    return order.scan(merge_slots, running, parts)


def fold_into_slots(query: Tensor, k: Tensor, v: Tensor, sums: Tensor, maximum: Tensor) -> None:
    """Take rows k, v (U, H, n, E) of U users into running values, in place: sums (U, H, K, E + 1) float64 and maxima
    (U, H, K). query (H, K, E). No gradient, a CPU alone.

    The rows' part is (softmax-weighted values, 1), and the log-sum-exp of their logits stands where `slot_parts` has
    the maximum: the same sums by another scale, and torch's fused attention gives both without writing a logit.
    """
    query = query.to(k.dtype).expand(len(k), *query.shape)
    read, scale = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, k, v)
    larger = torch.maximum(maximum, scale)
    old, new = (maximum - larger).exp().double(), (scale - larger).exp().double()
    sums *= old[..., None]
    sums[..., :-1] += read * new[..., None]
    sums[..., -1] += new
    maximum.copy_(larger)
