"""The contract of a memory: what every kind in ``make_memory`` must do, a new one as soon as config.py lists it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.config import _CHOICES, ModelConfig
from vista.models.memory import ASKABLE, AskableMemory, Memory, Running, make_memory
from vista.ops.order import SegmentOrder

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
        assert start.dtype == now.dtype
        assert now.dtype in ((torch.int8,) if name.endswith("residue") else (torch.float32, torch.float64))


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


def test_a_scan_over_ragged_users_is_merge_after_merge(memory):
    lengths = [3, 0, 2]
    order = SegmentOrder.of(torch.tensor(lengths))
    k, v = torch.randn(2, sum(lengths), HEADS, SEGMENT, HEAD_WIDTH, generator=torch.Generator().manual_seed(1))
    after, last = memory.scan(order, memory.initial(len(lengths)), memory.parts(k, v, all_valid(k)))
    for user, (first, count) in enumerate(zip(order.first.tolist(), lengths, strict=True)):
        running = memory.initial(1)
        for segment in range(first, first + count):
            rows = slice(segment, segment + 1)
            running = memory.merge(running, memory.parts(k[rows], v[rows], all_valid(k[rows])))
            for found, expected in zip(after, running, strict=True):
                torch.testing.assert_close(found[rows], expected)
        for found, expected in zip(last, running, strict=True):
            torch.testing.assert_close(found[user : user + 1], expected)


def test_gradients_are_finite_whatever_the_keys(memory):
    """Zero keys, equal ones, large ones, and a history of nothing."""
    k, v = keys_and_values(3 * SEGMENT)
    k[:, :, :SEGMENT], k[:, :, SEGMENT : 2 * SEGMENT], k[:, :, -1] = 0, k[:, :, :1], 1e4
    k.requires_grad_()
    v.requires_grad_()
    whole = read(memory, fold(memory, k, v, SEGMENT), k.shape[2])
    (whole.square().sum() + read(memory, memory.initial(1), 0).square().sum()).backward()
    gradients = [t.grad for t in (k, v, *memory.parameters()) if t.grad is not None]  # type: ignore[attr-defined]
    assert len(gradients) >= 2
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.fixture(params=sorted(ASKABLE))
def askable(request) -> AskableMemory:
    torch.manual_seed(3)
    return ASKABLE[request.param](ModelConfig(**CONFIG))


def test_a_readout_answers_with_what_was_stored_at_a_key(askable):
    """Of some events with keys unlike one another, the key of one asks for its value more than for the others'."""
    k = torch.eye(HEAD_WIDTH).expand(1, HEADS, -1, -1) * 2
    v = torch.randn(1, HEADS, HEAD_WIDTH, HEAD_WIDTH, generator=torch.Generator().manual_seed(2))
    answer, mass = askable.ask(askable.readout(fold(askable, k, v, 3)), k)
    likeness = torch.nn.functional.cosine_similarity(answer[:, :, :, None], v[:, :, None], dim=-1)
    assert torch.equal(likeness.argmax(-1), torch.arange(HEAD_WIDTH).expand(1, HEADS, -1))
    assert (mass is not None) == askable.has_mass
    assert mass is None or mass.shape == (1, HEAD_WIDTH, HEADS)


def test_a_readout_is_of_fixed_size_and_users_do_not_meet(askable):
    k, v = keys_and_values(2 * SEGMENT)
    one, other = fold(askable, k, v, SEGMENT), fold(askable, v, k, SEGMENT)
    both = tuple(torch.cat(tensors) for tensors in zip(one, other, strict=True))
    q = torch.randn(2, HEADS, 4, HEAD_WIDTH)
    together, _ = askable.ask(askable.readout(both), q)
    for user, running in enumerate((one, other)):
        readout = askable.readout(running)
        assert readout.shape == askable.readout(askable.initial(1)).shape
        torch.testing.assert_close(askable.ask(readout, q[user : user + 1])[0], together[user : user + 1])
