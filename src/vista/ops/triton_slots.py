"""Triton kernels of the parts of memory `slots`: each seed's softmax over one segment, forward and backward.

Logits and weights, (H, K, S) per segment, never leave the multiprocessor: keys and values are read, and numerators,
denominators and maxima written. The torch form is `vista.ops.slots.slot_parts`, which this must equal.

Shape letters: G segments (of all users together), S rows of a segment, H heads, E head width, K seeds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vista.ops.triton_common import block, dot, launch, load_rows, rows_last, store_rows, strides, tile_of

NOTHING = tl.constexpr(-1e30)  # EMPTY_MAXIMUM of vista.ops.slots: stands for minus infinity, whose differences are NaN
SEEDS_PER_BLOCK = 64
QUERY_PROGRAMS = 1024  # among which the segments are divided for the gradient of the queries


@triton.jit
def _logits(query, key, is_valid, scale, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """(BLOCK_K, BLOCK_S) float32, `NOTHING` where a row is not valid."""
    product = dot(query, tl.trans(key), tl.zeros((BLOCK_K, BLOCK_S), tl.float32))
    return tl.where(is_valid[None, :], product * scale, NOTHING)


@triton.jit
def _parts_kernel(
    query, k, v, valid, sums, maximum, q_h, q_k, k_g, k_h, k_s, v_g, v_h, v_s, S, H, scale,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Numerator, denominator and maximum of BLOCK_K seeds over one segment; the maximum runs, as in online softmax."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    seed, e = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    q = load_rows(query + h * q_h, seed, q_k, K, e, E).to(k.dtype.element_ty)
    numerator = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    denominator = tl.zeros((BLOCK_K,), tl.float32)
    largest = tl.full((BLOCK_K,), NOTHING, tl.float32)
    for start in range(0, S, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        key = load_rows(k + g * k_g + h * k_h, row, k_s, S, e, E)
        value = load_rows(v + g * v_g + h * v_h, row, v_s, S, e, E)
        is_valid = tl.load(valid + g * S + row, mask=row < S, other=0) != 0
        logits = _logits(q, key, is_valid, scale, BLOCK_K, BLOCK_S)
        larger = tl.maximum(largest, tl.max(logits, 1))
        weight = tl.where(is_valid[None, :], tl.exp(logits - larger[:, None]), 0.0)
        shrink = tl.exp(largest - larger)
        denominator = denominator * shrink + tl.sum(weight, 1)
        numerator = dot(weight.to(value.dtype), value, numerator * shrink[:, None])
        largest = larger
    base = sums + (g * H + h) * K * (E + 1)
    store_rows(base, seed, E + 1, K, e, E, numerator)
    tl.store(base + seed * (E + 1) + E, denominator, mask=seed < K)
    tl.store(maximum + (g * H + h) * K + seed, largest, mask=seed < K)


@triton.jit
def _weights(query, k, valid, maximum, d_sums, value, key, g, h, row, seed, e, q_h, q_k, S, H, scale,
             K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Again the weights of a block of seeds and rows, and the gradients of numerators and logits; the queries, too."""
    q = load_rows(query + h * q_h, seed, q_k, K, e, E).to(k.dtype.element_ty)
    is_valid = tl.load(valid + g * S + row, mask=row < S, other=0) != 0
    largest = tl.load(maximum + (g * H + h) * K + seed, mask=seed < K, other=0.0)
    logits = _logits(q, key, is_valid, scale, BLOCK_K, BLOCK_S)
    inside = is_valid[None, :] & (seed[:, None] < K)
    weight = tl.where(inside, tl.exp(logits - largest[:, None]), 0.0)
    base = d_sums + (g * H + h) * K * (E + 1)
    d_numerator = load_rows(base, seed, E + 1, K, e, E).to(value.dtype)
    d_denominator = tl.load(base + seed * (E + 1) + E, mask=seed < K, other=0.0)
    d_weight = dot(d_numerator, tl.trans(value), tl.zeros((BLOCK_K, BLOCK_S), tl.float32)) + d_denominator[:, None]
    return q, weight, d_numerator, (d_weight * weight * scale).to(value.dtype)


@triton.jit
def _rows_backward_kernel(
    query, k, v, valid, maximum, d_sums, dk, dv, q_h, q_k, k_g, k_h, k_s, v_g, v_h, v_s,
    dk_g, dk_h, dk_s, dv_g, dv_h, dv_s, S, H, scale,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one segment and head: a block of rows against all seeds."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, e = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    key = load_rows(k + g * k_g + h * k_h, row, k_s, S, e, E)
    value = load_rows(v + g * v_g + h * v_h, row, v_s, S, e, E)
    d_key, d_value = tl.zeros((BLOCK_S, BLOCK_E), tl.float32), tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for start in range(0, K, BLOCK_K):
        seed = start + tl.arange(0, BLOCK_K)
        q, weight, d_numerator, d_logits = _weights(query, k, valid, maximum, d_sums, value, key, g, h, row, seed, e,
                                                    q_h, q_k, S, H, scale, K, E, BLOCK_K, BLOCK_S)  # fmt: skip
        d_value = dot(tl.trans(weight.to(value.dtype)), d_numerator, d_value)
        d_key = dot(tl.trans(d_logits), q, d_key)
    store_rows(dk + g * dk_g + h * dk_h, row, dk_s, S, e, E, d_key.to(key.dtype))
    store_rows(dv + g * dv_g + h * dv_h, row, dv_s, S, e, E, d_value.to(value.dtype))


@triton.jit
def _query_backward_kernel(
    query, k, v, valid, maximum, d_sums, d_query, q_h, q_k, k_g, k_h, k_s, v_g, v_h, v_s, S, H, scale,
    num_segments, per_program,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_K queries from some of the segments: one partial sum per program, in a fixed order."""
    share, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    seed, e = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    d_q = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for g in range(share * per_program, tl.minimum((share + 1) * per_program, num_segments)):
        for start in range(0, S, BLOCK_S):
            row = start + tl.arange(0, BLOCK_S)
            key = load_rows(k + g * k_g + h * k_h, row, k_s, S, e, E)
            value = load_rows(v + g * v_g + h * v_h, row, v_s, S, e, E)
            _, _, _, d_logits = _weights(query, k, valid, maximum, d_sums, value, key, g, h, row, seed, e,
                                         q_h, q_k, S, H, scale, K, E, BLOCK_K, BLOCK_S)  # fmt: skip
            d_q = dot(d_logits, key, d_q)
    store_rows(d_query + (share * H + h) * K * E, seed, E, K, e, E, d_q)


class SlotParts(torch.autograd.Function):
    """query (H, K, E), k, v (G, H, S, E), is_valid (G, S), to sums (G, H, K, E + 1) and maxima (G, H, K) float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, k: Tensor, v: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        query, k, v, valid = rows_last(query), rows_last(k), rows_last(v), is_valid.contiguous().view(torch.uint8)
        (num_segments, heads, size, e), seeds = k.shape, query.shape[1]
        sums = k.new_empty(num_segments, heads, seeds, e + 1, dtype=torch.float32)
        maximum = k.new_empty(num_segments, heads, seeds, dtype=torch.float32)
        settings = _settings(size, e, seeds)
        grid = (num_segments, heads, triton.cdiv(seeds, settings["BLOCK_K"]))
        launch(_parts_kernel, grid, query, k, v, valid, sums, maximum, *strides(query, k, v), size, heads, e**-0.5,
               seeds, e, **settings)  # fmt: skip
        ctx.save_for_backward(query, k, v, valid, maximum)
        ctx.mark_non_differentiable(maximum)
        return sums, maximum

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, k, v, valid, maximum = ctx.saved_tensors
        (num_segments, heads, size, e), seeds = k.shape, query.shape[1]
        d_sums, d_k, d_v = d_sums.contiguous(), torch.empty_like(k), torch.empty_like(v)
        settings = _settings(size, e, seeds)
        sizes = (size, heads, e**-0.5)
        grid = (num_segments, heads, triton.cdiv(size, settings["BLOCK_S"]))
        launch(_rows_backward_kernel, grid, query, k, v, valid, maximum, d_sums, d_k, d_v,
               *strides(query, k, v, d_k, d_v), *sizes, seeds, e, **settings)  # fmt: skip
        per_program = max(1, triton.cdiv(num_segments * heads, QUERY_PROGRAMS))
        shares = triton.cdiv(num_segments, per_program)
        d_query = query.new_empty(shares, heads, seeds, e, dtype=torch.float32)
        grid = (shares, heads, triton.cdiv(seeds, settings["BLOCK_K"]))
        launch(_query_backward_kernel, grid, query, k, v, valid, maximum, d_sums, d_query, *strides(query, k, v),
               *sizes, num_segments, per_program, seeds, e, **settings)  # fmt: skip
        return d_query.sum(0).to(query.dtype), d_k, d_v, None


def _settings(size: int, e: int, seeds: int) -> dict[str, int]:
    settings = tile_of(size, e, e)
    del settings["BLOCK_F"]
    return settings | {"BLOCK_K": min(block(seeds), SEEDS_PER_BLOCK), "num_warps": max(4, settings["num_warps"])}
