"""Triton kernels of the segment-causal operator: segment sums, and reading a memory; forward and backward.

Each fuses activation, product and accumulation, so that every input is read once and every output is written once; the
scan between the two is in `vista.ops.triton_scan`. What that is worth in bytes stands in docs/performance.md. Products
take inputs in the type of the rows (float32: IEEE, not TF32), sums are float32. Nothing here waits for the GPU.

The torch forms in `vista.ops.qla` are what these must equal, values and gradients (tests/ops/test_kernels.py). Import
this module only where Triton is installed; `vista.ops.forms` decides.

Shape letters: G segments (of all users together), S rows of a segment, H heads, E head width, F value width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vista.ops.triton_common import (
    dot,
    launch,
    load_rows,
    rows_last,
    silu,
    silu_slope,
    store_rows,
    strides,
    tile_of,
)


@triton.jit
def _sums_kernel(
    k, v, valid, z, k_g, k_h, k_s, v_g, v_h, v_s, S, H,
    E: tl.constexpr, F: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Z_g = phi(K_g)^T V_g of one segment and head."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    sums = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
    for start in range(0, S, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        key = load_rows(k + g * k_g + h * k_h, row, k_s, S, e, E)
        value = load_rows(v + g * v_g + h * v_h, row, v_s, S, f, F)
        phi = silu(key.to(tl.float32))
        if HAS_VALID:
            is_valid = tl.load(valid + g * S + row, mask=row < S, other=0)
            phi = tl.where(is_valid[:, None] != 0, phi, 0.0)
        sums = dot(tl.trans(phi.to(value.dtype)), value, sums)
    inside = (e[:, None] < E) & (f[None, :] < F)
    tl.store(z + (g * H + h) * E * F + e[:, None] * F + f[None, :], sums, mask=inside)


@triton.jit
def _sums_backward_kernel(
    k, v, valid, dz, dk, dv, k_g, k_h, k_s, v_g, v_h, v_s, dk_g, dk_h, dk_s, dv_g, dv_h, dv_s, S, H,
    E: tl.constexpr, F: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dK = (V dZ^T) * phi'(K) and dV = phi(K) dZ of one segment and head."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    inside = (e[:, None] < E) & (f[None, :] < F)
    d_sums = tl.load(dz + (g * H + h) * E * F + e[:, None] * F + f[None, :], mask=inside, other=0.0)
    for start in range(0, S, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        key = load_rows(k + g * k_g + h * k_h, row, k_s, S, e, E)
        value = load_rows(v + g * v_g + h * v_h, row, v_s, S, f, F)
        phi, slope = silu(key.to(tl.float32)), silu_slope(key.to(tl.float32))
        if HAS_VALID:
            is_valid = tl.load(valid + g * S + row, mask=row < S, other=0)[:, None] != 0
            phi, slope = tl.where(is_valid, phi, 0.0), tl.where(is_valid, slope, 0.0)
        d_rows = d_sums.to(value.dtype)
        d_phi = dot(value, tl.trans(d_rows), tl.zeros((BLOCK_S, BLOCK_E), tl.float32))
        d_value = dot(phi.to(value.dtype), d_rows, tl.zeros((BLOCK_S, BLOCK_F), tl.float32))
        store_rows(dk + g * dk_g + h * dk_h, row, dk_s, S, e, E, (d_phi * slope).to(key.dtype))
        store_rows(dv + g * dv_g + h * dv_h, row, dv_s, S, f, F, d_value.to(value.dtype))


@triton.jit
def _normed(memory, eps, size: tl.constexpr, HAS_NORM: tl.constexpr):
    """The memory's scale: 1 / root mean square, or 1."""
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(memory * memory, 1), 0) / size + eps)
    return scale


@triton.jit
def _read_kernel(
    q, memory, o, q_g, q_h, q_s, o_g, o_h, o_s, S, H, eps,
    E: tl.constexpr, F: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """O_g = phi(Q_g) phi(norm(M_g)) of one segment and head: the memory is read, normed and activated once."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    inside = (e[:, None] < E) & (f[None, :] < F)
    before = tl.load(memory + (g * H + h) * E * F + e[:, None] * F + f[None, :], mask=inside, other=0.0)
    active = silu(before * _normed(before, eps, E * F, HAS_NORM)).to(q.dtype.element_ty)
    for start in range(0, S, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        query = load_rows(q + g * q_g + h * q_h, row, q_s, S, e, E)
        phi = silu(query.to(tl.float32)).to(query.dtype)
        out = dot(phi, active, tl.zeros((BLOCK_S, BLOCK_F), tl.float32))
        store_rows(o + g * o_g + h * o_h, row, o_s, S, f, F, out.to(query.dtype))


@triton.jit
def _read_backward_kernel(
    q, memory, do, dq, dm, q_g, q_h, q_s, do_g, do_h, do_s, dq_g, dq_h, dq_s, S, H, eps,
    E: tl.constexpr, F: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dQ = (dO A^T) * phi'(Q); dA = phi(Q)^T dO; dN = dA * phi'(N); dM = r (dN - N mean(dN * N)), with N = r M."""
    g, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    inside = (e[:, None] < E) & (f[None, :] < F)
    place = (g * H + h) * E * F + e[:, None] * F + f[None, :]
    before = tl.load(memory + place, mask=inside, other=0.0)
    scale = _normed(before, eps, E * F, HAS_NORM)
    normed = before * scale
    active = tl.trans(silu(normed).to(q.dtype.element_ty))
    d_active = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
    for start in range(0, S, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        query = load_rows(q + g * q_g + h * q_h, row, q_s, S, e, E)
        d_out = load_rows(do + g * do_g + h * do_h, row, do_s, S, f, F)
        d_phi = dot(d_out, active, tl.zeros((BLOCK_S, BLOCK_E), tl.float32))
        slope = silu_slope(query.to(tl.float32))
        store_rows(dq + g * dq_g + h * dq_h, row, dq_s, S, e, E, (d_phi * slope).to(query.dtype))
        phi = silu(query.to(tl.float32)).to(query.dtype)
        d_active = dot(tl.trans(phi), d_out, d_active)
    d_memory = d_active * silu_slope(normed)
    if HAS_NORM:
        shared = tl.sum(tl.sum(d_memory * normed, 1), 0) / (E * F)
        d_memory = scale * (d_memory - normed * shared)
    tl.store(dm + place, d_memory, mask=inside)


class SegmentSums(torch.autograd.Function):
    """k (G, H, S, E), v (G, H, S, F), is_valid (G, S) or None, to Z (G, H, E, F) float32."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, is_valid: Tensor | None) -> Tensor:
        k, v = rows_last(k), rows_last(v)
        valid = None if is_valid is None else is_valid.contiguous().view(torch.uint8)
        ctx.save_for_backward(k, v, valid)
        (num_segments, heads, size, e), f = k.shape, v.shape[-1]
        z = k.new_empty(num_segments, heads, e, f, dtype=torch.float32)
        sizes = (size, heads, e, f, valid is not None)
        launch(_sums_kernel, (num_segments, heads), k, v, k if valid is None else valid, z, *strides(k, v), *sizes,
               **tile_of(size, e, f))  # fmt: skip
        return z

    @staticmethod
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v, valid = ctx.saved_tensors
        (num_segments, heads, size, e), f = k.shape, v.shape[-1]
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        sizes = (size, heads, e, f, valid is not None)
        launch(_sums_backward_kernel, (num_segments, heads), k, v, k if valid is None else valid, d_z.contiguous(),
               d_k, d_v, *strides(k, v, d_k, d_v), *sizes, **tile_of(size, e, f))  # fmt: skip
        return d_k, d_v, None


class ReadMemory(torch.autograd.Function):
    """q (G, H, S, E), memory (G, H, E, F) float32, eps of the norm or None for no norm, to (G, H, S, F)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, memory: Tensor, eps: float | None) -> Tensor:
        q, memory = rows_last(q), memory.contiguous()
        ctx.save_for_backward(q, memory)
        ctx.eps = eps
        (num_segments, heads, size, e), f = q.shape, memory.shape[-1]
        # rows before heads, so that joining the heads is a view
        o = q.new_empty(num_segments, size, heads, f).transpose(1, 2)
        sizes = (size, heads, eps or 0.0, e, f, eps is not None)
        launch(_read_kernel, (num_segments, heads), q, memory, o, *strides(q, o), *sizes, **tile_of(size, e, f))
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor, Tensor, None]:
        q, memory = ctx.saved_tensors
        (num_segments, heads, size, e), f = q.shape, memory.shape[-1]
        d_o, d_q, d_memory = rows_last(d_o), torch.empty_like(q), torch.empty_like(memory)
        sizes = (size, heads, ctx.eps or 0.0, e, f, ctx.eps is not None)
        launch(_read_backward_kernel, (num_segments, heads), q, memory, d_o, d_q, d_memory, *strides(q, d_o, d_q),
               *sizes, **tile_of(size, e, f))  # fmt: skip
        return d_q, d_memory, None
