"""Attention with its log-sum-exp is its definition, and sources merged are one attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.ops.attend import LEAST_BIAS, attend, attend_naive, merge

Q, HEADS, ROWS, WIDTH = 2, 3, 5, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def source(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    return tuple(random(Q, HEADS, rows, WIDTH, seed=seed + i) for i in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("bias_rows", [0, 1, ROWS])
def test_attention_is_its_definition(bias_rows: int) -> None:
    q = random(Q, HEADS, ROWS, WIDTH)
    bias = random(Q, HEADS, bias_rows, 7, seed=9) if bias_rows else None
    torch.testing.assert_close(attend(q, *source(7, 1), bias), attend_naive(q, *source(7, 1), bias))


def test_sources_merged_are_one_attention() -> None:
    q = random(Q, HEADS, ROWS, WIDTH)
    one, other = source(7, 1), source(2, 5)
    together = [torch.cat(pair, 2) for pair in zip(one, other, strict=True)]
    torch.testing.assert_close(merge([attend(q, *one), attend(q, *other)]), attend_naive(q, *together)[0])


def test_a_source_of_nothing_has_no_weight() -> None:
    q = random(Q, HEADS, ROWS, WIDTH)
    nothing = attend(q, *source(7, 1), torch.full((Q, HEADS, 1, 7), LEAST_BIAS))
    assert bool((nothing[1] <= LEAST_BIAS / 2).all())
    assert torch.equal(torch.nn.functional.softplus(nothing[1]), torch.zeros(Q, HEADS, ROWS))
    one = attend(q, *source(3, 5))
    assert torch.equal(merge([one, nothing]), one[0])
