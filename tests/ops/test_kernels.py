"""Every form of the operators that models use, against the definition: torch, tiles, and Triton's kernels.

Without a GPU, kernels run in Triton's interpreter, one program after another in Python: hence the small shapes. They
are ragged in every direction all the same: users of no, one and several segments, segments that fill no block, head
widths that are no power of two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from tests.models.worlds import histories, summarizer
from vista.ops import forms, tiled
from vista.ops.forms import kernels_on
from vista.ops.order import SegmentOrder
from vista.ops.qla import no_norm, rms_norm, scan_sums, segment_causal_qla, segment_causal_qla_naive, segment_sums
from vista.ops.slots import EMPTY_MAXIMUM, scan_slots, slot_parts, slot_reads_naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, SIZE = 2, 20
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest number


@pytest.fixture(params=["torch", "tiles", "kernels"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(forms, "_tiled", set())
    monkeypatch.setattr(tiled, "TILE_NUMBERS", 1)  # a segment each
    if request.param == "kernels" and (why_not := no_kernels()):
        pytest.skip(why_not)
    with kernels_on(*([DEVICE] if request.param == "kernels" else [])):
        yield request.param


@cache
def no_kernels() -> str:
    """Why kernels cannot be tested here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it is to be had on Linux alone)"
    triton, numpy = (tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    if DEVICE == "cpu" and triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 takes arrays of one number for numbers, which numpy 2.4 refuses"
    return ""


def rows_of(num_segments: list[int], width: int, dtype: torch.dtype, num: int = 3) -> list[Tensor]:
    """Random rows of segments, (G, H, SIZE, width) as the model has them: a view with heads inside the rows."""
    generator = torch.Generator().manual_seed(1)
    shape = (num, sum(num_segments), SIZE, HEADS * width)
    rows = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    return [t.unflatten(-1, (HEADS, width)).transpose(1, 2).requires_grad_() for t in rows]


def one_history(rows: Tensor, order: SegmentOrder, user: int, head: int) -> Tensor:
    """The rows of one user and head, (N, width) float64, in main memory."""
    return rows.detach()[order.user == user, head].flatten(0, 1).double().cpu().requires_grad_()


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(found.double().cpu(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def weights(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64).view(like.shape)


@pytest.mark.parametrize(
    ("num_segments", "width", "dtype", "norm"),
    [
        ([2, 0, 1], 6, torch.float32, rms_norm),
        ([1], 16, torch.float32, no_norm),
        ([2], 16, torch.bfloat16, rms_norm),
        ([0], 4, torch.float32, rms_norm),
    ],
)
def test_segment_causal_equals_the_definition(form, num_segments, width, dtype, norm):
    order = SegmentOrder.of(torch.tensor(num_segments))
    q, k, v = rows_of(num_segments, width, dtype)
    start = torch.full((len(num_segments), HEADS, width, width), 0.25, device=DEVICE, requires_grad=True)
    out, _, last = segment_causal_qla(q, k, v, start, order, norm)
    (out.double() * weights(out).to(DEVICE)).sum().add(last.square().sum()).backward()
    weight = weights(out)
    for user in range(len(num_segments)):
        for head in range(HEADS):
            rows = [one_history(t, order, user, head) for t in (q, k, v)]
            memory = start.detach()[user, head].double().cpu().requires_grad_()
            expected, expected_last = segment_causal_qla_naive(*rows, SIZE, norm, memory)
            mine = order.user == user
            assert_near(out[mine, head].flatten(0, 1), expected.detach(), dtype)
            assert_near(last[user, head], expected_last.detach(), dtype)
            loss = (expected * weight[mine, head].flatten(0, 1)).sum() + expected_last.square().sum()
            *d_rows, d_memory = torch.autograd.grad(loss, [*rows, memory], allow_unused=True)
            assert_near(start.grad[user, head], d_memory, dtype)
            for t, g in zip((q, k, v), d_rows, strict=True):
                if g is not None:  # None: no event, no gradient
                    assert_near(t.grad[mine, head].flatten(0, 1), g, dtype)
    assert out.dtype == dtype
    assert last.dtype == start.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("num_segments", "seeds", "width", "dtype"),
    [([2, 0, 1], 5, 6, torch.float32), ([1], 70, 4, torch.float32), ([2], 16, 16, torch.bfloat16)],
)
def test_slots_equal_the_definition(form, num_segments, seeds, width, dtype):
    """Values and gradients of the softmax over whole histories, of which the last rows do not count."""
    order = SegmentOrder.of(torch.tensor(num_segments))
    k, v = rows_of(num_segments, width, dtype, num=2)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(HEADS, seeds, width, generator=generator).to(DEVICE).requires_grad_()
    is_valid = torch.ones(sum(num_segments), SIZE, dtype=torch.bool, device=DEVICE)
    is_valid[order.first[-1] + order.num_segments[-1] - 1, 13:] = False  # the last segment of the last user
    shape = (len(num_segments), HEADS, seeds)
    empty = torch.zeros(*shape, width + 1, device=DEVICE), torch.full(shape, EMPTY_MAXIMUM, device=DEVICE)
    residue = torch.zeros_like(empty[0], dtype=torch.int8)
    after, (sums, maximum, _) = scan_slots(order, (*empty, residue), slot_parts(query, k, v, is_valid))
    assert [len(t) for t in after] == [sum(num_segments)] * 3
    lively = order.num_segments > 0
    reads = sums[lively][..., :-1] / sums[lively][..., -1:]
    (reads.double() * weights(reads).to(DEVICE)).sum().backward()
    d_query, users = torch.zeros_like(query).double().cpu(), lively.nonzero().squeeze(1).tolist()
    for place, user in enumerate(users):
        for head in range(HEADS):
            kept = is_valid[order.user == user].flatten().cpu()
            rows = [one_history(t, order, user, head) for t in (k, v)]
            mine = query.detach()[head].double().cpu().requires_grad_()
            expected, mass = slot_reads_naive(mine, *(t[kept] for t in rows))
            assert_near(reads[place, head], expected.detach(), dtype)
            found = maximum[user, head] + sums[user, head, :, -1].log()
            assert_near(found, mass.detach(), dtype)
            loss = (expected * weights(reads)[place, head]).sum()
            d_mine, *d_rows = torch.autograd.grad(loss, [mine, *rows])
            d_query[head] += d_mine
            for t, g in zip((k, v), d_rows, strict=True):
                assert_near(t.grad[order.user == user, head].flatten(0, 1), g, dtype)
    assert_near(query.grad, d_query, dtype)


def test_rows_that_are_not_valid_add_nothing_to_a_segments_sum(form):
    k, v = rows_of([1], 4, torch.float32, num=2)
    is_valid = (torch.arange(SIZE, device=DEVICE) < 7)[None]
    torch.testing.assert_close(segment_sums(k, v, is_valid), segment_sums(k[:, :, :7], v[:, :, :7]))
    (gradient,) = torch.autograd.grad(segment_sums(k, v, is_valid).sum(), k)
    assert not gradient[:, :, 7:].any()
    assert gradient[:, :, :7].any()


def test_a_scan_carries_what_rounding_lost(form):
    """Equal parts that float32 cannot add: the residue makes the sum good, in kernels as in torch."""
    num = 60
    order = SegmentOrder.of(torch.tensor([num]))
    part = torch.full((num, 1, 1, 2), 0.1, device=DEVICE)
    part[:, ..., 1] = 0.0
    start = torch.full((1, 1, 1, 2), 1e5, device=DEVICE), torch.zeros(1, 1, 1, 2, dtype=torch.int8, device=DEVICE)
    (after, residues), (last, _) = scan_sums(order, start, (part,))
    expected = torch.tensor([1e5 + num * float(part[0, 0, 0, 0]), 1e5], dtype=torch.float64)
    torch.testing.assert_close(last[0, 0, 0].double().cpu(), expected, rtol=7e-8, atol=0)
    assert torch.equal(after[-1], last[0])
    assert residues[..., 0].any()
    plain = start[0][0].clone()
    for p in part:
        plain += p
    assert float(plain[0, 0, 0]) != pytest.approx(float(expected[0]), rel=1e-7)


@pytest.mark.parametrize(("attention", "memory"), [("qla", "sum"), ("softmax", "slots")])
def test_a_summarizer_on_kernels_is_that_on_torch(attention, memory):
    """The model calls what was tested above, with the same numbers and gradients at the end."""
    if why_not := no_kernels():
        pytest.skip(why_not)
    found = []
    for device in ([DEVICE], []):
        model = summarizer(attention=attention, memory=memory, num_layers=2 if memory == "sum" else 1).to(DEVICE)
        with kernels_on(*device):
            tokens = model(histories([9, 0]).to(DEVICE))
            tokens.square().mul(torch.arange(12, device=DEVICE)).sum().backward()
        found.append([tokens.detach(), *(p.grad.to_dense() for p in model.parameters())])
    for mine, expected in zip(*found, strict=True):
        assert_near(mine, expected.cpu(), torch.float32)
