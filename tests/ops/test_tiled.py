"""What is peculiar to tiles: gradients against finite differences, parts nobody reads, and cost that grows with length.

That they are the definition stands in test_kernels.py, with the other forms.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.hot_paths import count
from vista.ops import tiled
from vista.ops.order import SegmentOrder
from vista.ops.qla import NORM_EPS, merge_sums
from vista.ops.slots import EMPTY_MAXIMUM, merge_slots

SEGMENTS, HEADS, SIZE, WIDTH, SEEDS = 3, 2, 4, 3, 2


def rows(num: int = 2, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (SEGMENTS, SIZE, HEADS, WIDTH)
    made = [torch.randn(shape, dtype=torch.float64, generator=generator).transpose(1, 2) for _ in range(num)]
    return [t.requires_grad_(requires_grad) for t in made]


def validity(kind: str) -> Tensor:
    """Of all rows; of some; of none in one segment."""
    is_valid = torch.ones(SEGMENTS, SIZE, dtype=torch.bool)
    if kind != "all":
        is_valid[1, 2:] = False
    if kind == "none":
        is_valid[2] = False
    return is_valid


@pytest.fixture(autouse=True, params=[1, 10**6])
def tile_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_NUMBERS", request.param)


@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_gradients_of_sums_equal_finite_differences(kind: str) -> None:
    k, v = rows()
    is_valid = validity(kind)
    assert torch.autograd.gradcheck(lambda k, v: tiled.SegmentSums.apply(k, v, is_valid), (k, v))


@pytest.mark.parametrize("eps", [NORM_EPS, None])
def test_gradients_of_reads_equal_finite_differences(eps: float | None) -> None:
    (q,) = rows(1)
    memory = torch.randn(SEGMENTS, HEADS, WIDTH, WIDTH + 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, m: tiled.ReadMemory.apply(q, m, eps), (q, memory))


@pytest.mark.parametrize("kind", ["all", "some", "none"])
@pytest.mark.parametrize("read", ["both", "numerator", "denominator"])
def test_gradients_of_slots_equal_finite_differences(kind: str, read: str) -> None:
    """Of what no scale changes: the mean value, and log(denominator) + scale, alone and together."""
    query = torch.randn(HEADS, SEEDS, WIDTH, dtype=torch.float64, requires_grad=True)
    is_valid = validity(kind)

    def tokens(query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        sums, scale = tiled.SlotParts.apply(query, k, v, is_valid, EMPTY_MAXIMUM)
        some = is_valid.any(1)
        numerator, denominator = sums[some][..., :-1], sums[some][..., -1:]
        found = {"numerator": numerator / denominator, "denominator": denominator.log() + scale[some][..., None]}
        return tuple(found.values()) if read == "both" else (found[read],)

    assert torch.autograd.gradcheck(tokens, (query, *rows()))


def running_of(kind: str, num_users: int, size: int = WIDTH) -> tuple[Tensor, ...]:
    total = torch.rand(num_users, HEADS, SEEDS, size, dtype=torch.float64)
    residue = torch.zeros_like(total, dtype=torch.int8)
    return (total, residue) if kind == "sums" else (total, torch.randn_like(total[..., 0]), residue)


@pytest.mark.parametrize("kind", ["sums", "slots"])
@pytest.mark.parametrize("num_segments", [[2, 0, 1], [3], [1, 1, 1], [0, 0]])
def test_gradients_of_a_scan_are_those_of_its_steps(kind: str, num_segments: list[int]) -> None:
    order, merge = SegmentOrder.of(torch.tensor(num_segments)), merge_sums if kind == "sums" else merge_slots
    running, parts = running_of(kind, len(num_segments)), running_of(kind, sum(num_segments))[:-1]
    wanted = [running[0].requires_grad_(), parts[0].requires_grad_()]
    found = []
    for scan in (lambda: tiled.scan(order, merge, running, parts), lambda: order.scan(merge, running, parts)):
        after, last = scan()
        reads = (after[0].sin().sum() + last[0].cos().sum(), last[0].cos().sum(), after[0].sin().sum())
        found += [torch.autograd.grad(read, wanted, retain_graph=True, allow_unused=True) for read in reads]
    for mine, expected in zip(found[:3], found[3:], strict=True):
        for one, other, like in zip(mine, expected, wanted, strict=True):
            torch.testing.assert_close(*(torch.zeros_like(like) if t is None else t for t in (one, other)))


@pytest.mark.parametrize("kind", ["sums", "slots"])
@pytest.mark.parametrize("form", ["tiles", "torch"])
def test_a_scan_twice_as_long_costs_twice_as_much(kind: str, form: str) -> None:
    """Not four times: once each step gathered its rows, and going backward wrote zeros for all others."""
    bytes_moved = []
    for num in (20, 40):
        order, merge = SegmentOrder.of(torch.tensor([num])), merge_sums if kind == "sums" else merge_slots
        running, parts = running_of(kind, 1, 64), running_of(kind, num, 64)[:-1]
        parts[0].requires_grad_()
        scan = tiled.scan if form == "tiles" else lambda order, merge, *values: order.scan(merge, *values)
        bytes_moved.append(
            count(lambda o=order, m=merge, s=scan, v=(running, parts): s(o, m, *v)[1][0].sum().backward())["bytes"]
        )
    assert bytes_moved[1] < 2.2 * bytes_moved[0]
