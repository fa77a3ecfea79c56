"""What our Triton kernels share: loads, products and activations; and how they are launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_BLOCK = 16  # of each side of a product: what the matrix units take
ROWS_PER_BLOCK = 64
NUMBERS_PER_WARP = 1024  # of a tile of rows
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def dot(a, b, sums):
    """sums + a b in float32; float32 inputs are not rounded to TF32."""
    if INTERPRETED:  # the interpreter keeps bfloat16 as integers, and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def load_rows(base, row, row_stride, num_rows, column, W: tl.constexpr):
    """Rows of a matrix of W columns, zeros outside: (rows, columns) in their own type."""
    inside = (row[:, None] < num_rows) & (column[None, :] < W)
    return tl.load(base + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, row, row_stride, num_rows, column, W: tl.constexpr, values):
    inside = (row[:, None] < num_rows) & (column[None, :] < W)
    tl.store(base + row[:, None] * row_stride + column[None, :], values, mask=inside)


def tile_of(num_rows: int, e: int, f: int) -> dict[str, int]:
    """A kernel's tile of rows of e and f numbers: BLOCK_S rows of BLOCK_E and BLOCK_F, and the warps that share them.

    One rule instead of a search: head widths are few, and a search would time kernels in the middle of a run.
    """
    rows, wide_e, wide_f = min(block(num_rows), ROWS_PER_BLOCK), block(e), block(f)
    return {"BLOCK_S": rows, "BLOCK_E": wide_e, "BLOCK_F": wide_f, "num_warps": warps(rows * max(wide_e, wide_f))}


def block(size: int) -> int:
    """The smallest allowed block that holds ``size``."""
    return max(LEAST_BLOCK, triton.next_power_of_2(size))


def warps(numbers: int) -> int:
    """Warps for a tile of so many numbers: 1, 2, 4 or 8."""
    return max(1, min(8, numbers // NUMBERS_PER_WARP))


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, num_warps: int, **constants: Any
) -> None:
    """Start a kernel on the device of ``first``, unless there is nothing to do."""
    if not all(grid):
        return
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](first, *arguments, num_warps=num_warps, num_stages=2, **constants)


def rows_last(x: Tensor) -> Tensor:
    """x itself if the numbers of a row lie side by side, as kernels expect, else a copy for which that is so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """The strides of all but the last dimension, tensor after tensor."""
    return [s for t in tensors for s in t.stride()[:-1]]
