"""The operators on a CPU, forward and backward, in tiles: some segments at a time, so few that they stay in the cache.

What `vista.ops.triton_qla`, `triton_slots` and `triton_scan` are on a GPU: every input is read once and every output is
written once, in buffers that are used again, rows are never copied into another order, and activations and weights are
computed again going backward instead of stored. The definitions stand in `vista.ops.qla` and `vista.ops.slots`, which
call this where `vista.ops.forms` says so; values and gradients are equal (tests/ops).

Shape letters: B users, G segments (of all users together), g segments of a tile, S rows of a segment, H heads, E head
width, F value width, K seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vista.ops.order import SegmentOrder

TILE_NUMBERS = 131_072  # of one input in a tile: half a megabyte; half of it was slower, and twice no faster
BLIND = 2.0**-40  # a gradient of a read this small beside that of its denominator is as good as none
Values = tuple[Tensor, ...]
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SegmentSums(torch.autograd.Function):
    """k (G, H, S, E), v (G, H, S, F), is_valid (G, S) or None, to phi(K)^T V (G, H, E, F), as it is carried."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, is_valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(k, v, is_valid)
        z = k.new_empty(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=_carried_type(k))
        tiles = _tiles(k)
        buffer = _rows_like(k, tiles)
        for rows in tiles:
            _multiply(_active(k[rows], is_valid, rows, buffer).mT, v[rows], z[rows])
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v, is_valid = ctx.saved_tensors
        d_z = d_z.to(k.dtype)
        tiles = _tiles(k)
        d_k, d_v, buffer = _rows_like(k), _rows_like(v), _rows_like(k, tiles, num=2)
        for rows in tiles:
            phi, slope = _active_and_slope(k[rows], is_valid, rows, buffer)
            _multiply(v[rows], d_z[rows].mT, d_k[rows])
            _multiply(phi, d_z[rows], d_v[rows])
            d_k[rows].mul_(slope)
        return d_k, d_v, None


class ReadMemory(torch.autograd.Function):
    """q (G, H, S, E), memory (G, H, E, F), eps of the norm or None for no norm, to (G, H, S, F) in q's type."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, memory: Tensor, eps: float | None) -> Tensor:
        ctx.save_for_backward(q, memory)
        ctx.eps = eps
        tiles = _tiles(q)
        o, buffer = _rows_like(q, width=memory.shape[-1]), _rows_like(q, tiles)
        for rows in tiles:
            phi = _active(q[rows], None, rows, buffer)
            active = torch.nn.functional.silu(_normed(memory[rows], eps)[0]).to(q.dtype)
            _multiply(phi, active, o[rows])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor, Tensor, None]:
        q, memory = ctx.saved_tensors
        tiles = _tiles(q)
        d_q, d_memory, buffer = _rows_like(q), torch.empty_like(memory), _rows_like(q, tiles, num=2)
        for rows in tiles:
            phi, slope = _active_and_slope(q[rows], None, rows, buffer)
            normed, scale = _normed(memory[rows], ctx.eps)
            active, d_active = torch.nn.functional.silu(normed).to(q.dtype), torch.empty_like(normed)
            _multiply(d_o[rows], active.mT, d_q[rows])
            _multiply(phi.mT, d_o[rows], d_active)
            d_q[rows].mul_(slope)
            d_normed = torch.ops.aten.silu_backward(d_active, normed)
            if scale is None:
                d_memory[rows] = d_normed
            else:
                shared = (d_normed * normed).mean((-2, -1), keepdim=True)
                d_memory[rows] = scale * (d_normed - normed * shared)
        return d_q, d_memory, None


class SlotParts(torch.autograd.Function):
    """query (H, K, E), k, v (G, H, S, E), is_valid (G, S), to sums (G, H, K, E + 1) and scales (G, H, K), as they are
    carried. No gradient flows through scales.

    A part is (softmax-weighted values, 1), and where other forms have the maximum stands the log-sum-exp of the logits:
    the same sums by another scale, and torch's fused attention gives both without writing a logit.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, k: Tensor, v: Tensor, is_valid: Tensor, empty: float) -> tuple[Tensor, Tensor]:
        (num_segments, heads, _, width), seeds = k.shape, query.shape[1]
        query, mask = query.to(k.dtype), _mask(is_valid, k, empty)
        sums = k.new_empty(num_segments, heads, seeds, width + 1, dtype=_carried_type(k))
        scale = sums.new_empty(num_segments, heads, seeds)
        for rows in _tiles(k):
            asked = query.expand(rows.stop - rows.start, *query.shape)
            read, scale[rows] = _attend(asked, k[rows], v[rows], attn_mask=None if mask is None else mask[rows])
            sums[rows, ..., :-1] = read
        sums[..., -1] = 1.0
        if mask is not None:
            sums *= is_valid.any(1)[:, None, None, None]
        ctx.save_for_backward(query, k, v, is_valid, mask, scale)
        ctx.mark_non_differentiable(scale)
        return sums, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, k, v, is_valid, mask, scale = ctx.saved_tensors
        d_query, d_k, d_v = torch.zeros_like(query, dtype=d_sums.dtype), _rows_like(k), _rows_like(v)
        for rows in _tiles(k):
            d_part = d_sums[rows]
            if mask is not None:
                d_part = d_part * is_valid[rows].any(1)[:, None, None, None]
            d_read, stand_in = (t.to(k.dtype) for t in _for_attention(d_part[..., :-1], d_part[..., -1:]))
            d_asked, d_k[rows], d_v[rows] = _attend_backward(
                d_read, query.expand(len(d_read), *query.shape), k[rows], v[rows], stand_in, scale[rows], 0.0, False,
                attn_mask=None if mask is None else mask[rows],
            )  # fmt: skip
            d_query += d_asked.sum(0)
        return d_query, d_k, d_v, None, None


def _for_attention(d_read: Tensor, d_denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (..., E) and (..., 1) of a part as attention's backward takes them: its output's gradient, and what
    stands in for its output.

    A logit's gradient is weight x (d_read . value + d_denominator). Attention, whose weights add up to 1, has
    d_read . value - d_read . output, and no other use for its output: one along d_read with d_read . output =
    -d_denominator does it.
    """
    peak = torch.linalg.vector_norm(d_read, ord=torch.inf, dim=-1, keepdim=True)
    least = d_denominator.abs() * BLIND
    direction = d_read / peak.clamp(min=torch.finfo(peak.dtype).tiny)
    is_blind = peak < least
    if is_blind.any():  # nothing to stand along: a read that nearly nothing depends on, but its mass does
        d_read = d_read.masked_fill(is_blind, 0.0)
        d_read[..., :1].masked_scatter_(is_blind, least[is_blind])
        direction = direction.masked_fill(is_blind, 0.0)
        direction[..., :1].masked_fill_(is_blind, 1.0)
        peak = torch.maximum(peak, least)
    length = direction.square().sum(-1, keepdim=True).clamp_(min=1.0).mul_(peak)
    return d_read.contiguous(), direction * (-d_denominator / length.clamp_(min=torch.finfo(peak.dtype).tiny))


def scan(
    order: SegmentOrder, merge: Callable[[Values, Values], Values], running: Values, parts: Values
) -> tuple[Values, Values]:
    """``order.scan`` of a compensated sum, rescaled or not."""
    values = Scan.apply(order, merge, *running, *parts)
    return values[: len(running)], values[len(running) :]


class Scan(torch.autograd.Function):
    """What ``order.scan`` returns, one after another, of a compensated sum (sums, residues) or of one that is rescaled
    (sums, maxima, residues); no gradient flows through maxima.

    values: the running value (B, ...), then the parts (G, ...). Forward is ``order.scan`` itself. Backward goes from
    the newest segment to the oldest: a part's gradient is the running value's, times the part's scale.
    """

    @staticmethod
    def forward(ctx: Any, order: SegmentOrder, merge: Callable[[Values, Values], Values], *values: Tensor) -> Values:
        num_parts = len(values) // 2  # the running value has a residue beside
        running, parts = values[: num_parts + 1], values[num_parts + 1 :]
        after, last = order.scan(merge, running, parts)
        ctx.order, ctx.num_parts = order, num_parts
        ctx.save_for_backward(*(running[1], parts[1], after[1]) if num_parts == 2 else ())
        ctx.mark_non_differentiable(*after[1:], *last[1:])
        ctx.set_materialize_grads(False)
        return *after, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        order, d_after, d_last = ctx.order, gradients[0], gradients[ctx.num_parts + 1]
        like = d_last if d_last is not None else d_after
        if like is None:
            return (None,) * (3 + 2 * ctx.num_parts)
        shape = like.shape[1:]
        d_total = like.new_zeros(order.num_users, *shape) if d_last is None else d_last.clone()
        d_part = like.new_empty(len(order.user), *shape)
        rest = [None] * len(order.steps) if d_after is None else order.by_step(d_after)
        scales = _scales(order, *ctx.saved_tensors)
        for users, d_step, d_here, scale in reversed(
            list(zip(order.steps, d_part.split(order.sizes), rest, scales, strict=True))
        ):
            d_now = d_total if users is None else d_total[users]
            if d_here is not None:
                d_now += d_here
            if scale is None:
                d_step.copy_(d_now)
            else:
                torch.mul(d_now, scale[1], out=d_step)
                d_now *= scale[0]
            if users is not None:
                d_total.index_copy_(0, users, d_now)
        others = (None,) * ctx.num_parts
        return None, None, d_total, *others, order.by_segment(d_part), *others[1:]


def _scales(order: SegmentOrder, *maxima: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """By which each step scaled the running value and the part, (users of the step, ..., 1) each; None for none.

    maxima: of the initial running value (B, ...), of the parts (G, ...) and of the running value after each segment.
    """
    if not maxima:
        return [None] * len(order.steps)
    initial, part, after = maxima
    some = order.num_segments > 0
    before = after.roll(1, 0).index_copy_(0, order.first[some], initial[some])
    old, new = ((t - after).exp_()[..., None] for t in (before, part))
    return list(zip(order.by_step(old), order.by_step(new), strict=True))


def _carried_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(rows: Tensor) -> list[slice]:
    """Slices of segments (G, H, S, E) whose rows have TILE_NUMBERS numbers."""
    size = max(TILE_NUMBERS // max(rows[:1].numel(), 1), 1)
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def _rows_like(x: Tensor, tiles: list[slice] | None = None, width: int | None = None, num: int = 0) -> Tensor:
    """Room for rows (G, H, S, E) as models have them, heads inside the rows, so that joining heads is a view; with
    tiles, for one of them; with num, (num, G, H, S, E)."""
    num_segments = len(x) if tiles is None else max((t.stop - t.start for t in tiles), default=0)
    shape = (num_segments, x.shape[2], x.shape[1], width or x.shape[3])
    return x.new_empty(*((num, *shape) if num else shape)).transpose(-3, -2)


def _active(x: Tensor, is_valid: Tensor | None, rows: slice, buffer: Tensor) -> Tensor:
    """phi(x) of a tile (g, H, S, E), zero where rows do not count."""
    phi = torch.ops.aten.silu.out(x, out=buffer[: len(x)])
    return phi if is_valid is None else phi.mul_(is_valid[rows, None, :, None])


def _active_and_slope(x: Tensor, is_valid: Tensor | None, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """phi(x) of a tile and its slope, which have the exponential in common: s = sigmoid(x), phi = x s, slope = s + phi
    (1 - s). buffer: room for both, (2, g, H, S, E)."""
    slope = torch.sigmoid(x, out=buffer[1, : len(x)])
    phi = torch.mul(x, slope, out=buffer[0, : len(x)])
    slope.addcmul_(phi, 1 - slope)
    if is_valid is not None:
        phi.mul_(is_valid[rows, None, :, None])
        slope.mul_(is_valid[rows, None, :, None])
    return phi, slope


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, (g, H, ., .) each, in the type of the rows. Head by head, so that nothing is put into another order,
    and by a dense tensor, since torch multiplies into any other matrix by matrix."""
    for left, right, target in zip(a.unbind(1), b.unbind(1), out.unbind(1), strict=True):
        target.copy_(torch.bmm(left, right))


def _normed(memory: Tensor, eps: float | None) -> tuple[Tensor, Tensor | None]:
    """`vista.ops.qla.rms_norm` and the scale it multiplied with."""
    if eps is None:
        return memory, None
    scale = torch.rsqrt(memory.square().mean((-2, -1), keepdim=True) + eps)
    return memory * scale, scale


def _mask(is_valid: Tensor, k: Tensor, empty: float) -> Tensor | None:
    """What is added to logits, (G, 1, 1, S): ``empty`` where a row does not count; None where all do."""
    if is_valid.all():
        return None
    return k.new_zeros(is_valid.shape).masked_fill_(~is_valid, empty)[:, None, None]
