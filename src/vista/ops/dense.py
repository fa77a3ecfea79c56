"""The dense steps of a layer on a CPU with gradients: norm and projections, and norm and gated unit.

In tiles of rows that stay in the cache from the norm to the last product, forward and backward, so that of all between
only what the gated unit multiplies is written: norms and their products are made again going backward. The definitions
stand beside (``*_naive``); values and gradients are equal (tests/ops/test_dense.py).

Shape letters: N rows, D width, P columns of a projection, F hidden width of a gated unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, rms_norm

from vista.ops.forms import uses_tiles

TILE_NUMBERS = 131_072  # of the rows of a tile


def pays(*tensors: Tensor) -> bool:
    """Whether the tiles run: on a CPU, where a gradient is asked for, in one type."""
    return (
        torch.is_grad_enabled()
        and uses_tiles(*tensors)
        and not torch.is_autocast_enabled("cpu")
        and len({t.dtype for t in tensors}) == 1
    )


def project_naive(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """norm(x) W^T for each weight (P, D), of rows x (N, D)."""
    return tuple(linear(rms_norm(x, x.shape[-1:]), weight) for weight in weights)


def add_unit_naive(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """x + SGLU(norm(x)) of rows x (N, D), with the weights into (2 F, D) and out (D, F)."""
    value, gate = linear(rms_norm(x, x.shape[-1:]), into).chunk(2, -1)
    return x + linear(value * gate, out)


class Project(torch.autograd.Function):
    """`project_naive`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        made = tuple(x.new_empty(len(x), len(weight)) for weight in weights)
        scale, buffer = _scales(x), _tile_like(x)
        for rows in _tiles(x):
            normed = _normed(x, scale, rows, buffer)
            for weight, target in zip(weights, made, strict=True):
                torch.mm(normed, weight.t(), out=target[rows])
        ctx.save_for_backward(x, scale, *weights)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_made: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *weights = ctx.saved_tensors
        d_made = tuple(d.contiguous() for d in d_made)
        d_x, d_weights = torch.empty_like(x), [torch.zeros_like(weight) for weight in weights]
        buffer, d_buffer = _tile_like(x), _tile_like(x)
        for rows in _tiles(x):
            normed, d_normed = _normed(x, scale, rows, buffer), d_buffer[: rows.stop - rows.start]
            for i, (d, weight, d_weight) in enumerate(zip(d_made, weights, d_weights, strict=True)):
                d_normed.addmm_(d[rows], weight, beta=int(i > 0))
                d_weight.addmm_(d[rows].t(), normed)
            _norm_backward(d_normed, normed, scale[rows], out=d_x[rows])
        return d_x, *d_weights


class AddUnit(torch.autograd.Function):
    """`add_unit_naive`. What value and gate were is kept, 2 F numbers a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, out: Tensor) -> Tensor:
        both, result = x.new_empty(len(x), len(into)), torch.empty_like(x)
        scale, buffer, hidden = _scales(x), _tile_like(x), _tile_like(x, out.shape[1])
        for rows in _tiles(x):
            value, gate = torch.mm(_normed(x, scale, rows, buffer), into.t(), out=both[rows]).chunk(2, -1)
            product = torch.mul(value, gate, out=hidden[: len(value)])
            torch.addmm(x[rows], product, out.t(), out=result[rows])
        ctx.save_for_backward(x, scale, both, into, out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, both, into, out = ctx.saved_tensors
        d_result = d_result.contiguous()
        d_x, d_into, d_out = torch.empty_like(x), torch.zeros_like(into), torch.zeros_like(out)
        buffer, d_buffer, hidden, d_both = (_tile_like(x, n) for n in (x.shape[1], x.shape[1], out.shape[1], len(into)))
        for rows in _tiles(x):
            size, d = rows.stop - rows.start, d_result[rows]
            value, gate = both[rows].chunk(2, -1)
            d_out.addmm_(d.t(), torch.mul(value, gate, out=hidden[:size]))
            d_product = torch.mm(d, out, out=hidden[:size])
            d_value, d_gate = d_both[:size].chunk(2, -1)
            torch.mul(d_product, gate, out=d_value)
            torch.mul(d_product, value, out=d_gate)
            normed = _normed(x, scale, rows, buffer)
            d_into.addmm_(d_both[:size].t(), normed)
            d_normed = torch.mm(d_both[:size], into, out=d_buffer[:size])
            _norm_backward(d_normed, normed, scale[rows], out=d_x[rows]).add_(d)
        return d_x, d_into, d_out


def _tiles(x: Tensor) -> list[slice]:
    size = max(TILE_NUMBERS // x.shape[1], 1)
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _tile_like(x: Tensor, width: int | None = None) -> Tensor:
    """Room for one tile of rows."""
    return x.new_empty(min(max(TILE_NUMBERS // x.shape[1], 1), len(x)), width or x.shape[1])


def _scales(x: Tensor) -> Tensor:
    """What each row is multiplied with by `rms_norm`, (N, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    eps = length.new_tensor(torch.finfo(x.dtype).eps)
    return torch.addcmul(eps, length, length, value=1 / x.shape[1]).rsqrt_()


def _normed(x: Tensor, scale: Tensor, rows: slice, buffer: Tensor) -> Tensor:
    return torch.mul(x[rows], scale[rows], out=buffer[: rows.stop - rows.start])


def _norm_backward(d_normed: Tensor, normed: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """scale (dN - N mean(dN N)), N being what the norm gave; d_normed is used up."""
    shared = torch.mul(d_normed, normed, out=out).mean(-1, keepdim=True)
    return torch.mul(d_normed.addcmul_(normed, shared, value=-1), scale, out=out)
