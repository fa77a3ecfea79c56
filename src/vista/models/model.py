"""What every model has in common: a `TimelineBatch` in, an `Output` out, in two steps.

`prepare` computes what the requests of a batch share, `rank` scores candidates from it. A full ranking calls `rank`
again and again with other candidates on what was prepared once.

Shape letters: B lanes, Q requests, C candidates, T tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from vista.models.batch import Memory, Output, Requests, TimelineBatch


class Model(nn.Module, ABC):
    """One model. Those that carry no memory from stretch to stretch leave ``init_memory`` as it is."""

    def forward(self, batch: TimelineBatch, memory: Memory) -> Output:
        """Score a batch on top of the memory (B, ...) its lanes carry."""
        prepared, last = self.prepare(batch, memory)
        return Output(self.rank(prepared, batch.requests), last)

    def init_memory(self, num_lanes: int) -> Memory:
        """The memory of lanes that start at the beginning of a history."""
        return ()

    @abstractmethod
    def prepare(self, batch: TimelineBatch, memory: Memory) -> tuple[Any, Memory]:
        """What the requests of a batch share, in a form of the model's own, and each lane's memory after the batch."""

    @abstractmethod
    def rank(self, prepared: Any, requests: Requests) -> Tensor:
        """Logits (Q, C, T) of requests of a prepared batch, whatever their candidates."""
