"""Triton kernels of the scan: each user's segments merged into the running value one after another, and back.

A program owns some numbers of one user and walks along the user's segments with them in registers: a part is read
once and a running value written once. In time order, like `vista.ops.order.SegmentOrder.scan`, which it must equal, so
that a result does not depend on how a history was cut. One kernel serves both memories: with maxima (`slots`) the
running sum is rescaled before each addition, without (`sum`) it is not.

Shape letters: B users, G segments (of all users together), R rows and W numbers of a row of one running value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vista.ops.order import SegmentOrder
from vista.ops.qla import RESIDUE_STEP
from vista.ops.triton_common import launch

NUMBERS = 256  # of one program: one user alone then still keeps several multiprocessors busy
PER_STEP = tl.constexpr(1 / RESIDUE_STEP)
STEP = tl.constexpr(RESIDUE_STEP)
ROUNDER = tl.constexpr(12_582_912.0)  # 1.5 x 2^23: added and taken away, it rounds to the nearest integer, ties to even


@triton.jit
def _add_compensated(total, residue, part):
    """`vista.ops.qla.add_compensated` of numbers: the sum, and the residue as a whole number."""
    addend = part + residue * total * STEP
    after = total + addend
    lost = addend - (after - total)
    steps = tl.where(after != 0, lost / tl.where(after != 0, after, 1.0) * PER_STEP, 0.0)
    return after, tl.clamp(steps, -127.0, 127.0) + ROUNDER - ROUNDER


@triton.jit
def _scan_kernel(
    first, count, total, residue, part, maximum, part_maximum, after, after_residue, after_maximum,
    last, last_residue, last_maximum, SIZE, W: tl.constexpr, HAS_MAXIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, row = place < SIZE, place // W
    leads, num_rows = inside & (place % W == 0), SIZE // W
    start, num_segments = tl.load(first + b), tl.load(count + b)
    now = tl.load(total + b * SIZE + place, mask=inside, other=0.0)
    rest = tl.load(residue + b * SIZE + place, mask=inside, other=0).to(tl.float32)
    largest = now
    if HAS_MAXIMUM:
        largest = tl.load(maximum + b * num_rows + row, mask=inside, other=0.0)
    for j in range(num_segments):
        g = start + j
        addend = tl.load(part + g * SIZE + place, mask=inside, other=0.0)
        if HAS_MAXIMUM:
            theirs = tl.load(part_maximum + g * num_rows + row, mask=inside, other=0.0)
            larger = tl.maximum(largest, theirs)
            now, addend = now * tl.exp(largest - larger), addend * tl.exp(theirs - larger)
            largest = larger
            tl.store(after_maximum + g * num_rows + row, largest, mask=leads)
        now, rest = _add_compensated(now, rest, addend)
        tl.store(after + g * SIZE + place, now, mask=inside)
        tl.store(after_residue + g * SIZE + place, rest.to(tl.int8), mask=inside)
    tl.store(last + b * SIZE + place, now, mask=inside)
    tl.store(last_residue + b * SIZE + place, rest.to(tl.int8), mask=inside)
    if HAS_MAXIMUM:
        tl.store(last_maximum + b * num_rows + row, largest, mask=leads)


@triton.jit
def _scan_backward_kernel(
    first, count, maximum, part_maximum, after_maximum, d_after, d_last, d_total, d_part,
    SIZE, W: tl.constexpr, HAS_MAXIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the newest segment to the oldest: a part's gradient is the running value's, times the part's scale."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, row, num_rows = place < SIZE, place // W, SIZE // W
    start, num_segments = tl.load(first + b), tl.load(count + b)
    gradient = tl.load(d_last + b * SIZE + place, mask=inside, other=0.0)
    for j in range(num_segments):
        g = start + num_segments - 1 - j
        gradient += tl.load(d_after + g * SIZE + place, mask=inside, other=0.0)
        mine, before = gradient, gradient
        if HAS_MAXIMUM:
            largest = tl.load(after_maximum + g * num_rows + row, mask=inside, other=0.0)
            theirs = tl.load(part_maximum + g * num_rows + row, mask=inside, other=0.0)
            is_first = g == start
            initial = tl.load(maximum + b * num_rows + row, mask=inside & is_first, other=0.0)
            earlier = tl.load(after_maximum + (g - 1) * num_rows + row, mask=inside & (g > start), other=0.0)
            mine = gradient * tl.exp(theirs - largest)
            before = gradient * tl.exp(tl.where(is_first, initial, earlier) - largest)
        tl.store(d_part + g * SIZE + place, mine, mask=inside)
        gradient = before
    tl.store(d_total + b * SIZE + place, gradient, mask=inside)


def scan(
    order: SegmentOrder, running: tuple[Tensor, ...], parts: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``order.scan`` returns of sums (total, residue) or of rescaled sums (total, maximum, residue)."""
    bounds = [t.to(parts[0].device, non_blocking=True) for t in (order.first, order.num_segments)]
    if len(running) == 2:
        values = Scan.apply(*bounds, *running, *parts, None, None)
        return values[:2], values[3:5]
    total, maximum, residue = running
    values = Scan.apply(*bounds, total, residue, parts[0], maximum, parts[1])
    return (values[0], values[2], values[1]), (values[3], values[5], values[4])


class Scan(torch.autograd.Function):
    """first, count (B,) int64; total (B, ..., W), residue int8, part (G, ..., W), and for rescaled sums the maxima
    (B, ...) and (G, ...), else None. Returns totals, residues and maxima after each segment (G, ...), then after the
    last (B, ...); no gradient flows through maxima."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, count: Tensor, total: Tensor, residue: Tensor, part: Tensor,
        maximum: Tensor | None, part_maximum: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        total, residue, part = total.contiguous(), residue.contiguous(), part.contiguous()
        # any tensor stands for maxima that are not there: the kernel is made without the lines that read it
        most = total[:0] if maximum is None else maximum.contiguous()
        part_most = total[:0] if part_maximum is None else part_maximum.contiguous()
        after = (torch.empty_like(part), torch.empty_like(part, dtype=torch.int8), torch.empty_like(part_most))
        last = (torch.empty_like(total), torch.empty_like(residue), torch.empty_like(most))
        _run(_scan_kernel, total, maximum is not None, first, count, total, residue, part, most, part_most,
             *after, *last, enable_fp_fusion=False)  # fmt: skip
        ctx.has_maximum = maximum is not None
        ctx.save_for_backward(first, count, most, part_most, after[2], total)
        ctx.mark_non_differentiable(after[1], after[2], last[1], last[2])
        return *after, *last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, count, most, part_most, after_most, total = ctx.saved_tensors
        d_after, d_last = gradients[0].contiguous(), gradients[3].contiguous()
        d_total, d_part = torch.empty_like(d_last), torch.empty_like(d_after)
        _run(_scan_backward_kernel, total, ctx.has_maximum, first, count, most, part_most, after_most, d_after, d_last,
             d_total, d_part)  # fmt: skip
        return None, None, d_total, None, d_part, None, None


def _run(kernel: Any, total: Tensor, has_maximum: bool, *arguments: Tensor, **options: Any) -> None:
    num_users, size = len(total), total[:1].numel()
    grid = (num_users, triton.cdiv(size, NUMBERS))
    launch(kernel, grid, *arguments, size, total.shape[-1], has_maximum, BLOCK=NUMBERS, num_warps=2, **options)
