"""Ridge and delta: the forms models use are their definitions, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.ops.delta import ask_delta, delta_naive, delta_parts, merge_delta
from vista.ops.ridge import ask_ridge, ridge_parts, ridge_read_naive, ridge_readout, unit

HEADS, WIDTH, QUERIES = 2, 5, 3
STRENGTH = torch.tensor([0.3, 2.0], dtype=torch.float64)


def rows(num_events: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, H, QUERIES, E), keys and values (1, H, N, E), float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (QUERIES, num_events, num_events)
    return tuple(
        torch.randn(1, HEADS, n, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True) for n in sizes
    )  # type: ignore[return-value]


def gates(num_events: int) -> tuple[Tensor, Tensor]:
    """Steps and logarithms of shares (1, H, N): some events correct nothing, some forget nothing."""
    generator = torch.Generator().manual_seed(5)
    step = torch.rand(1, HEADS, num_events, generator=generator, dtype=torch.float64)
    log_share = -(torch.rand(1, HEADS, num_events, generator=generator, dtype=torch.float64) ** 8)
    step[..., ::7], log_share[..., ::5] = 0, 0
    return step.requires_grad_(), log_share.requires_grad_()


def all_valid(k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)


@pytest.mark.parametrize("num_events", [0, 1, 3, 40])
def test_ridge_is_its_definition(num_events: int) -> None:
    inputs = rows(num_events)
    q, k, v = inputs
    read, mass = ask_ridge(ridge_readout(ridge_parts(k, v, all_valid(k)), STRENGTH), q)
    naive = [ridge_read_naive(q[0, h], k[0, h], v[0, h], float(STRENGTH[h])) for h in range(HEADS)]
    expected, leverage = (torch.stack(tensors)[None] for tensors in zip(*naive, strict=True))
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(mass, -leverage.log())
    weight = torch.arange(1, WIDTH + 1)
    found, wanted = (
        torch.autograd.grad((r * weight).sum() + m.sum(), inputs, allow_unused=True)
        for r, m in ((read, mass), (expected, -leverage.log()))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_repetition_does_not_drown_a_rare_event() -> None:
    """A million events with one key, then one with another: what the rare one said is read as well as before."""
    k = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])[None, None]
    v = torch.tensor([[5.0, 5, 5, 5, 5], [1, 2, 3, 4, 5]])[None, None]
    often, rare = (ridge_parts(k[:, :, [i]], v[:, :, [i]], all_valid(k[:, :, [i]])) for i in range(2))
    read, mass = ask_ridge(ridge_readout(1e6 * often + rare, torch.ones(1)), torch.eye(WIDTH)[None, None])
    torch.testing.assert_close(read[0, 0, 1], v[0, 0, 1] / 2)
    torch.testing.assert_close(read[0, 0, 2], torch.zeros(WIDTH))
    torch.testing.assert_close(mass[0, 0, :3].exp(), torch.tensor([1e6, 2.0, 1.0]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("chunk_events", [1, 4, 64])
@pytest.mark.parametrize("num_events", [1, 4, 14])
def test_delta_is_its_definition(num_events: int, chunk_events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vista.ops.delta.CHUNK_EVENTS", chunk_events)
    _, k, v = rows(num_events)
    inputs = (k, v, *gates(num_events))
    start = torch.randn(1, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    found = merge_delta(start, delta_parts(*inputs, all_valid(k)))
    expected = torch.stack([delta_naive(*(t[0, h] for t in inputs), start[0, h]) for h in range(HEADS)])[None]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, delta_parts(*inputs, all_valid(k))[1], atol=1e-3), "what was there is still felt"
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((t * weight).sum(), inputs) for t in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_delta_parts_of_two_halves_are_the_part_of_the_whole() -> None:
    _, k, v = rows(30)
    inputs = (k, v, *gates(30))
    first, second, whole = (
        delta_parts(*(t[:, :, chosen] for t in inputs), all_valid(k[:, :, chosen]))
        for chosen in (slice(0, 11), slice(11, 30), slice(0, 30))
    )
    torch.testing.assert_close(second[0] @ first[0], whole[0])
    torch.testing.assert_close(merge_delta(first[1], second), whole[1])


def test_the_newest_event_at_a_key_is_what_delta_answers() -> None:
    k = torch.eye(WIDTH)[None, None].repeat(1, 1, 2, 1)
    v = torch.randn(1, 1, 2 * WIDTH, WIDTH)
    one, never = torch.ones(1, 1, 2 * WIDTH), torch.zeros(1, 1, 2 * WIDTH)
    answer = ask_delta(delta_parts(k, v, one, never, all_valid(k))[1], k[:, :, :WIDTH])
    torch.testing.assert_close(answer, v[:, :, WIDTH:], rtol=1e-4, atol=1e-4)


def test_zero_keys_stay_zero() -> None:
    assert not unit(torch.zeros(3, WIDTH)).any()
