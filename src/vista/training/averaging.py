"""An average of the weights over the last steps: what a noisy walk of the optimizer circles around.

Steps of timelines are alike for a while (the same users go on), so the newest weights lean to whom they saw last; their
exponential average does not. Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

EVERY_STEPS = 5  # an average reads every weight, embedding tables too: not at each step


class WeightAverage:
    """The exponential average of a model's parameters. horizon: its length in steps; 0: the newest weights alone."""

    def __init__(self, model: nn.Module, horizon: int) -> None:
        self._model, self._horizon, self._updates = model, horizon, 0
        self._average: list[Tensor] = []

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for p in self._model.parameters()]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step``, every few steps. At first the average is over the last
        third of the steps there were, until that is as long as the horizon."""
        if self._horizon == 0 or step % EVERY_STEPS:
            return
        self._updates += 1
        if not self._average:
            self._average = [p.clone() for p in self._parameters()]
            return
        weight = min(1.0, max(3 / (self._updates + 2), EVERY_STEPS / self._horizon))
        torch._foreach_lerp_(self._average, self._parameters(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        if not self._average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for average, parameter in zip(self._average, self._parameters(), strict=True):
                newest = parameter.clone()
                parameter.copy_(average)
                average.copy_(newest)

    def state(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        names = (name for name, _ in self._model.named_parameters())
        return dict(zip(names, self._average, strict=False)) | {"updates": torch.tensor(self._updates)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` gave."""
        self._updates = int(state["updates"])
        if self._updates:
            self._average = [state[name].to(p.device).clone() for name, p in self._model.named_parameters()]
