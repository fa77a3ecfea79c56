"""The contract of a memory: what every kind in ``make_memory`` must do, a new one as soon as config.py lists it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.config import _CHOICES, ModelConfig
from vista.models.memory import Memory, Running, make_memory

USERS, SEGMENTS, SEGMENT = 2, 3, 8
CONFIG = {"width": 12, "num_heads": 2, "num_seeds": 5}
HEADS, SEEDS, HEAD_WIDTH = 2, 5, 6


@pytest.fixture(params=_CHOICES["model.memory"])
def memory(request) -> Memory:
    torch.manual_seed(3)
    return make_memory(ModelConfig(memory=request.param, **CONFIG))


def keys_and_values(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, HEADS, rows, HEAD_WIDTH, generator=generator)
    return k, v


def all_valid(k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)


def fold(memory: Memory, k: Tensor, v: Tensor, segment: int) -> Running:
    """The running value of one user after rows (1, H, N, E), segment by segment."""
    running = memory.initial(1)
    for start in range(0, k.shape[2], segment):
        rows = slice(start, start + segment)
        part = memory.parts(k[:, :, rows], v[:, :, rows], all_valid(k[:, :, rows]))
        running = memory.merge(running, part)
    return running


def read(memory: Memory, running: Running, num_events: int) -> Tensor:
    q, k, v = torch.randn(3, len(running[0]), HEADS, SEEDS, HEAD_WIDTH, generator=torch.Generator().manual_seed(9))
    return memory.read(running, q, k, v, torch.full((len(running[0]),), num_events))[0]


def test_names_types_and_sizes_are_those_promised(memory):
    empty = memory.initial(USERS)
    k, v = keys_and_values(SEGMENT)
    after = fold(memory, k, v, SEGMENT)
    assert len(memory.names) == len(empty) == len(after)
    for name, start, now in zip(memory.names, empty, after, strict=True):
        assert start.shape[0] == USERS
        assert start.shape[1:] == now.shape[1:], f"{name} does not keep its size"
        assert start.dtype == now.dtype == (torch.int8 if name.endswith("residue") else torch.float32)


def test_an_empty_memory_can_be_read(memory):
    assert torch.isfinite(read(memory, memory.initial(USERS), 0)).all()


def test_merging_parts_equals_one_part_of_everything(memory):
    """What streaming rests on: a part knows its own segment alone, and merge loses nothing."""
    k, v = keys_and_values(SEGMENTS * SEGMENT)
    by_segment = read(memory, fold(memory, k, v, SEGMENT), SEGMENTS * SEGMENT)
    torch.testing.assert_close(by_segment, read(memory, fold(memory, k, v, k.shape[2]), SEGMENTS * SEGMENT))


def test_rows_that_are_not_valid_count_for_nothing(memory):
    k, v = keys_and_values(SEGMENT)
    is_valid = torch.arange(SEGMENT)[None] < 5
    padded = memory.merge(memory.initial(1), memory.parts(k, v, is_valid))
    exact = fold(memory, k[:, :, :5], v[:, :, :5], 5)
    torch.testing.assert_close(read(memory, padded, 5), read(memory, exact, 5))


def test_users_do_not_meet(memory):
    """Parts of several users at once are the parts of each alone."""
    pairs = [keys_and_values(SEGMENT, seed) for seed in range(USERS)]
    k, v = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    together = memory.parts(k, v, all_valid(k))
    for user, (own_k, own_v) in enumerate(pairs):
        for found, expected in zip(together, memory.parts(own_k, own_v, all_valid(own_k)), strict=True):
            torch.testing.assert_close(found[user : user + 1], expected)


def test_a_part_changes_what_is_read(memory):
    k, v = keys_and_values(2 * SEGMENT)
    before = fold(memory, k[:, :, :SEGMENT], v[:, :, :SEGMENT], SEGMENT)
    assert not torch.allclose(
        read(memory, before, SEGMENT), read(memory, fold(memory, k, v, SEGMENT), 2 * SEGMENT), atol=1e-3
    )


def test_merge_leaves_what_it_was_given(memory):
    k, v = keys_and_values(2 * SEGMENT)
    running = fold(memory, k[:, :, :SEGMENT], v[:, :, :SEGMENT], SEGMENT)
    copy = [t.clone() for t in running]
    memory.merge(running, memory.parts(k[:, :, SEGMENT:], v[:, :, SEGMENT:], all_valid(k[:, :, SEGMENT:])))
    assert all(torch.equal(now, then) for now, then in zip(running, copy, strict=True))
