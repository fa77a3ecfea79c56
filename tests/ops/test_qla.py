"""The operator against its definition, its gradients against finite differences, and the claims of its docstrings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.models.layers import split_heads
from vista.ops.order import SegmentOrder
from vista.ops.qla import (
    no_norm,
    qla,
    qla_naive,
    rms_norm,
    segment_causal_qla,
    segment_causal_qla_naive,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sources_and_targets(n: int, m: int, e: int = 4, f: int = 5) -> list[Tensor]:
    return [random(*shape, seed=i) for i, shape in enumerate([(n, e), (n, e), (n, f), (m, e), (m, e), (m, f)])]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 3), (63, 1), (0, 2), (5, 0)])
@pytest.mark.parametrize("norm", [no_norm, rms_norm])
def test_values_and_gradients_equal_the_definition(n, m, norm):
    x = sources_and_targets(n, m)
    fast, naive = qla(*x, norm=norm), qla_naive(*x, norm=norm)
    weights = [random(*o.shape, seed=9).detach() for o in fast]
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), x, allow_unused=True)
        for out in (fast, naive)
    ]
    for a, b in zip(fast, naive, strict=True):
        torch.testing.assert_close(a, b)
    for a, b, t in zip(*gradients, x, strict=True):
        # a source that nothing reads has no gradient in one form and a zero one in the other
        torch.testing.assert_close(*(torch.zeros_like(t) if g is None else g for g in (a, b)))


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: qla(*x), sources_and_targets(5, 3))


def test_gradients_equal_the_closed_form():
    """dZ = (phi(Q_S)^T dO_S + phi(Q_T)^T dO_T) * phi'(Z), dV_S = phi(K_S) dZ: the outer phi is in it."""
    x = sources_and_targets(6, 2)
    q_s, k_s, v_s, q_t, _, _ = x
    o_s, o_t = qla(*x)
    d_s, d_t = random(*o_s.shape, seed=7).detach(), random(*o_t.shape, seed=8).detach()
    phi = torch.nn.functional.silu
    z = (phi(k_s).T @ v_s).detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi(z).sum(), z)
    d_z = (phi(q_s).T @ d_s + phi(q_t).T @ d_t) * slope
    (d_v,) = torch.autograd.grad((o_s * d_s).sum() + (o_t * d_t).sum(), v_s)
    torch.testing.assert_close(d_v, phi(k_s) @ d_z)


def test_a_target_never_sees_another_target():
    x = sources_and_targets(6, 3)
    before = qla(*x)[1]
    changed = [t.detach().clone() for t in x]
    for t in changed[3:]:
        t[2] += 1.0
    after = qla(*changed)[1]
    torch.testing.assert_close(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_zero_keys_are_padding():
    q_s, k_s, v_s, *targets = sources_and_targets(6, 2)
    k_s = torch.cat([k_s[:4], torch.zeros_like(k_s[4:])])
    padded = qla(q_s, k_s, v_s, *targets)
    short = qla(q_s[:4], k_s[:4], v_s[:4], *targets)
    torch.testing.assert_close(padded[0][:4], short[0])
    torch.testing.assert_close(padded[1], short[1])


def segments_of(lengths: list[int], size: int, heads: int, width: int, seed: int = 0):
    """Random q, k, v of users with these many events, packed into segments; and the rows of each user."""
    order = SegmentOrder.of(torch.tensor([-(-n // size) for n in lengths]))
    packed = [torch.zeros(len(order.user), size, heads * width, dtype=torch.float64) for _ in range(3)]
    per_user, first = [], 0
    for u, n in enumerate(lengths):
        rows = [random(n, heads * width, seed=seed + 10 * u + i).detach() for i in range(3)]
        for g in range(-(-n // size)):
            for target, source in zip(packed, rows, strict=True):
                part = source[g * size : (g + 1) * size]
                target[first + g, : len(part)] = part
        first += -(-n // size)
        per_user.append(rows)
    return order, [split_heads(t, heads).requires_grad_() for t in packed], per_user


@pytest.mark.parametrize("lengths", [[1], [8], [9, 0, 31], [17, 64, 3, 16]])
def test_segment_causal_equals_the_definition_for_ragged_users(lengths):
    size, heads, width = 8, 2, 3
    order, (q, k, v), per_user = segments_of(lengths, size, heads, width)
    memory = torch.zeros(len(lengths), heads, width, width, dtype=torch.float64)
    out, _, last = segment_causal_qla(q, k, v, memory, order)
    for u, rows in enumerate(per_user):
        mine = out[order.user == u].transpose(1, 2).flatten(0, 1)[: lengths[u]]
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            expected, expected_memory = segment_causal_qla_naive(*(t[:, columns] for t in rows), size)
            torch.testing.assert_close(mine[:, h], expected)
            # sums are kept in float32, whatever the type of the rows
            torch.testing.assert_close(last[u, h], expected_memory, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_one_segment_and_no_norm_is_the_papers_operator():
    order, (q, k, v), _ = segments_of([20], 20, 2, 3)
    memory = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    out, _, _ = segment_causal_qla(q, k, v, memory, order, norm=no_norm)
    nobody = q[:, :, :0]
    torch.testing.assert_close(out, qla(q, k, v, nobody, nobody, nobody)[0], rtol=1e-5, atol=1e-6)


def test_segment_causal_gradients_equal_the_definition():
    order, (q, k, v), _ = segments_of([20], 8, 1, 3)
    memory = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    out, _, _ = segment_causal_qla(q, k, v, memory, order)
    fast = torch.autograd.grad(out.sin().sum(), (q, k, v))
    flat = [t.transpose(1, 2).flatten(0, 1)[:, 0].detach().requires_grad_() for t in (q, k, v)]
    expected, _ = segment_causal_qla_naive(*flat, 8)
    naive = torch.autograd.grad(expected.sin().sum(), flat)
    for a, b in zip(fast, naive, strict=True):
        torch.testing.assert_close(a.transpose(1, 2).flatten(0, 1)[:, 0], b, rtol=1e-4, atol=1e-6)


def test_later_segments_change_nothing_earlier():
    order, (q, k, v), _ = segments_of([24], 8, 1, 3)
    memory = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    before, _, _ = segment_causal_qla(q, k, v, memory, order)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[2:] += 1.0
    v2[2:] -= 1.0
    after, _, _ = segment_causal_qla(q, k2, v2, memory, order)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def add(running: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(running, part, strict=True))


def test_scan_gives_the_running_value_after_each_segment_of_each_user():
    order = SegmentOrder.of(torch.tensor([2, 0, 3]))
    parts = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    (after,), (last,) = order.scan(add, (torch.tensor([[0.5], [7.0], [0.25]]),), (parts,))
    assert after.squeeze(1).tolist() == [1.5, 11.5, 100.25, 1100.25, 11100.25]
    assert last.squeeze(1).tolist() == [11.5, 7.0, 11100.25]


def test_rms_norm_removes_the_growth_with_repetition():
    memory = random(3, 3).detach()
    torch.testing.assert_close(rms_norm(memory * 1e6), rms_norm(memory), rtol=1e-4, atol=1e-6)
