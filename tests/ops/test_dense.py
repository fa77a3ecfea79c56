"""Dense steps in tiles are their definitions, in values and gradients, and run only where they may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.models.layers import GatedUnit, norm, project_normed
from vista.ops import dense

WIDTH = 6


@pytest.fixture(autouse=True, params=[2 * WIDTH, 10**6])
def tile_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "TILE_NUMBERS", request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(t.sin().sum() for t in results), inputs)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_projections_are_their_definition(num_rows: int) -> None:
    x, weights = random(num_rows, WIDTH), [random(4, WIDTH, seed=1), random(WIDTH, WIDTH, seed=2)]
    found, expected = dense.Project.apply(x, *weights), dense.project_naive(x, weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, [x, *weights]), gradients(expected, [x, *weights]))


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_a_gated_unit_is_its_definition(num_rows: int) -> None:
    inputs = [random(num_rows, WIDTH), random(8, WIDTH, seed=1), random(WIDTH, 4, seed=2)]
    found, expected = dense.AddUnit.apply(*inputs), dense.add_unit_naive(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients((found,), inputs), gradients((expected,), inputs))
    if num_rows:
        assert torch.autograd.gradcheck(dense.AddUnit.apply, inputs)


def test_models_call_them_where_a_gradient_is_asked_for() -> None:
    unit, linear = GatedUnit(WIDTH, 2).double(), torch.nn.Linear(WIDTH, 4, bias=False).double()
    torch.nn.init.normal_(unit.out.weight)
    x = random(2, 3, WIDTH)
    added, (projected,) = unit.added(x), project_normed(x, linear)
    assert "AddUnit" in str(added.grad_fn.next_functions)
    assert "Project" in str(projected.grad_fn.next_functions)
    torch.testing.assert_close(added, x + unit(norm(x)))
    torch.testing.assert_close(projected, linear(norm(x)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not dense.pays(x)
    with torch.no_grad():
        assert not dense.pays(x)
        torch.testing.assert_close(unit.added(x), added)
