"""The average of the weights over the last steps."""

from __future__ import annotations

import torch

from vista.training.averaging import EVERY_STEPS, WeightAverage


def walk(model: torch.nn.Module, average: WeightAverage, steps: range) -> list[torch.Tensor]:
    """Weights drawn anew at each step; those of the steps that an average reads."""
    read = []
    for step in steps:
        with torch.no_grad():
            model.weight.copy_(torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        if step % EVERY_STEPS == 0:
            read.append(model.weight.detach().clone())
    return read


def test_the_average_is_exponential_once_it_is_as_long_as_its_horizon():
    model = torch.nn.Linear(3, 2, bias=False)
    average = WeightAverage(model, 4 * EVERY_STEPS)
    read = walk(model, average, range(1, 40 * EVERY_STEPS + 1))
    naive = sum(0.25 * 0.75**age * weight for age, weight in enumerate(reversed(read)))
    newest = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), naive, rtol=0, atol=1e-4)  # what is older than 39 reads
    assert torch.equal(model.weight, newest)


def test_the_first_weights_are_forgotten_early():
    """A run shorter than the horizon is not an average from its first step on."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 1_000 * EVERY_STEPS)
    with torch.no_grad():
        for step in range(1, 30 * EVERY_STEPS + 1):
            model.weight.fill_(100.0 if step <= 5 * EVERY_STEPS else 1.0)
            average.update(step)
    with average.applied():
        assert 1.0 < float(model.weight.detach()) < 2.0


def test_no_horizon_leaves_the_weights_alone():
    model = torch.nn.Linear(3, 2, bias=False)
    average = WeightAverage(model, 0)
    walk(model, average, range(1, 3 * EVERY_STEPS + 1))
    newest = model.weight.detach().clone()
    with average.applied():
        assert torch.equal(model.weight, newest)
    assert average.state().keys() == {"updates"}


def test_it_goes_on_from_a_checkpoint():
    whole, cut = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
    average, first, second = WeightAverage(whole, 20), WeightAverage(cut, 20), WeightAverage(cut, 20)
    walk(whole, average, range(1, 61))
    walk(cut, first, range(1, 33))
    second.load(first.state())
    walk(cut, second, range(33, 61))
    assert all(torch.equal(a, b) for a, b in zip(average.state().values(), second.state().values(), strict=True))
