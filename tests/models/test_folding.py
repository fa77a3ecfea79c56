"""Tiles: the same memory as the definition gives, for any users, and none of them twice."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.models.worlds import histories, summarizer
from vista.models import folding
from vista.models.batch import flatten
from vista.models.summarizer import Summarizer

KINDS = [(attention, memory) for attention in ("qla", "softmax") for memory in ("sum", "slots")]
LENGTHS = [61, 0, 8, 7, 150, 33]


def tokens_by_definition(model: Summarizer, lengths: list[int]) -> torch.Tensor:
    """With gradients asked for, which tiles do not know."""
    with torch.enable_grad():
        return model(histories(lengths)).detach()


@pytest.mark.parametrize("rows", [8, 32, 2_048])
@pytest.mark.parametrize(("attention", "memory"), KINDS)
def test_tiles_equal_the_definition(attention: str, memory: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "TILE_ROWS", rows)
    model = summarizer(attention=attention, memory=memory).double()
    with torch.no_grad():
        assert_close(model(histories(LENGTHS)), tokens_by_definition(model, LENGTHS), rtol=1e-9, atol=1e-9)
    model.float()
    with torch.no_grad():
        assert_close(model(histories(LENGTHS)), tokens_by_definition(model, LENGTHS), rtol=2e-5, atol=2e-5)


def test_every_closed_segment_stands_in_one_tile_and_in_time_order() -> None:
    closed = torch.tensor([13, 0, 1, 8, 6, 21])
    found: list[list[int]] = [[] for _ in closed]
    for tile in folding.tiles(closed, 8):
        assert len(tile.users) * tile.num_segments <= 8
        for user, first in zip(tile.users.tolist(), tile.first.tolist(), strict=True):
            found[user] += range(first, first + tile.num_segments)
    assert found == [list(range(n)) for n in closed.tolist()]


@pytest.mark.parametrize("memory", ["sum", "slots"])
def test_who_has_no_closed_segment_keeps_the_bits(memory: str) -> None:
    model = summarizer(memory=memory)
    with torch.no_grad():
        before = model.extend(model.init_state(2), histories([40, 40]))
        after = model.extend(before, histories([0, 40], seed=1))
    for old, new in zip(flatten(before.memory), flatten(after.memory), strict=True):
        assert torch.equal(old[0], new[0])
    assert not torch.equal(flatten(before.memory)[0][1], flatten(after.memory)[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_sum_goes_back_to_what_it_was(dtype: torch.dtype) -> None:
    total = torch.tensor([3.0, -0.7, 1e-3, 0.0], dtype=dtype)
    residue = torch.tensor([50, -60, 9, 0], dtype=torch.int8)
    residue = residue if dtype == torch.float32 else torch.zeros_like(residue)
    again = folding.narrowed(folding.widened(total, residue), dtype)
    assert torch.equal(again[0], total)
    assert torch.equal(again[1], residue)
