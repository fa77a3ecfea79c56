"""``din``: target attention over all raw events, after Zhou et al. 2018, "Deep Interest Network".

Paper, equation 3, with a the activation unit, e_j the events and v the candidate:

    read(v) = sum_j a(e_j, v) e_j       a(e, v) = MLP [v, e, v - e, v * e]       no softmax over j

so that many matching events weigh more than few. The unit is one hidden layer of 36 PReLUs, as in the paper's figure 2
(its Dice is a batch norm over padded events, and its batches hold one request each where ours hold a user's many).

Ours: what is read goes through arsinh, which is linear near zero and a logarithm further out: a history of thousands
of events would otherwise drown the head, and a norm would take away the intensity that the sum is there for. A learned
number is added to a where an event is of the candidate's own item. Beside it, the parts named in ``base``.

Shape letters: N event rows, Q requests, C candidates, R raw events, D width, U hidden width of the unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vista.models.baselines.base import Baseline, Rows, Window, take
from vista.models.batch import Requests
from vista.models.layers import norm

UNIT_WIDTH = 36  # U, of the paper's figure 2
UNITS_AT_ONCE = 2**18  # outputs of units held at a time: 1 MiB, which stays in a cache


class WeighedUnits(torch.autograd.Function):
    """sum_u scale_u max(0, matrix_u . e): matrix (Q, C, U, F), e (Q, R, F), scale (U,), to (Q, C, R).

    The units' outputs, (Q, C, U, R), are U times as large as what is made of them. They are made for few requests at a
    time, used while they are in the cache, and never kept: the way back makes them again. With p the gradient where a
    unit is above 0, all three gradients follow from p e and p matrix.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, e: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, e, scale)
        out = e.new_empty(*matrix.shape[:2], e.shape[1])
        for some in _in_cache(matrix, e):
            units = _units(matrix[some], e[some]).relu_()
            torch.matmul(scale, units, out=out[some])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix, e, scale = ctx.saved_tensors
        pulled, of_e = torch.empty_like(matrix), torch.empty_like(e)
        scaled = matrix * scale[:, None]
        for some in _in_cache(matrix, e):
            units = _units(matrix[some], e[some])
            passed = torch.ops.aten.threshold_backward(gradient[some, :, None].expand_as(units), units, 0)
            flat = passed.flatten(1, 2)  # (q, C U, R)
            pulled[some] = (flat @ e[some]).view_as(pulled[some])
            torch.bmm(flat.transpose(1, 2), scaled[some].flatten(1, 2), out=of_e[some])
        return pulled * scale[:, None], of_e, (pulled * matrix).sum((0, 1, 3))


def _in_cache(matrix: Tensor, e: Tensor) -> list[slice]:
    """Requests whose units stay in the cache together; one request at least."""
    at_once = max(1, UNITS_AT_ONCE // max(1, matrix.shape[1] * matrix.shape[2] * e.shape[1]))
    return [slice(first, first + at_once) for first in range(0, len(e), at_once)]


def _units(matrix: Tensor, e: Tensor) -> Tensor:
    """matrix_u . e of all pairs, (Q, C, U, R)."""
    return (matrix.flatten(1, 2) @ e.transpose(1, 2)).unflatten(1, matrix.shape[1:3])


class ActivationUnit(nn.Module):
    """a(e, v) for all pairs of events and candidates, without making [v, e, v - e, v * e] of each pair.

    With the hidden layer's weights W = [W_v, W_e, W_d, W_p], its output is (v * W_p + W_e - W_d) e + (W_v + W_d) v + b:
    one matrix per candidate, times all events. PReLU(x) = slope x + (1 - slope) max(0, x), and the first of the two is
    linear: one vector per candidate, times all events.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * width, UNIT_WIDTH)
        self.prelu = nn.PReLU(UNIT_WIDTH)
        self.out = nn.Linear(UNIT_WIDTH, 1)
        self.same_item = nn.Parameter(torch.ones(1))
        # At first the own item's events count alone: a sum of a thousand random weights drowns what can be learned.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, v: Tensor, e: Tensor, is_same: Tensor) -> Tensor:
        """v (Q, C, D), e (Q, R, D), is_same (Q, C, R), to (Q, C, R). In float32, whatever autocast says."""
        with torch.autocast(v.device.type, enabled=False):
            v, e = v.float(), torch.cat([e, torch.ones_like(e[..., :1])], -1).float()
            w_v, w_e, w_difference, w_product = self.hidden.weight.chunk(4, 1)
            matrix = v[:, :, None] * w_product + (w_e - w_difference)  # (Q, C, U, D)
            constant = v @ (w_v + w_difference).T + self.hidden.bias  # (Q, C, U)
            matrix = torch.cat([matrix, constant[..., None]], -1)
            scale, slope = self.out.weight[0], self.prelu.weight
            linear = ((scale * slope) @ matrix) @ e.transpose(1, 2)
            above = WeighedUnits.apply(matrix, e, scale * (1 - slope))
            return linear + above + self.out.bias + is_same * self.same_item


def numbers_of_unit(num_candidates: int, num_events: int, width: int) -> int:
    """Numbers in the largest tensors of one request's ``ActivationUnit``."""
    return num_candidates * (num_events + UNIT_WIDTH * width) + num_events * width


class PairPooling(nn.Module):
    """arsinh(sum_j a(e_j, v) e_j) of the events that are there, beside its product with the candidate: (Q, C, 2D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unit = ActivationUnit(width)

    def forward(self, rows: Tensor, requests: Requests, candidate_x: Tensor) -> Tensor:
        e = take(rows, requests.recent)
        window = Window.own(requests)
        weight = self.unit(candidate_x, e, window.is_same_item(requests)) * window.is_there[:, None]
        read = torch.asinh(weight.to(e.dtype) @ e)
        return torch.cat([read, read * norm(candidate_x)], -1)


class DIN(Baseline):
    """Cost of a request: C x R activation units, 36 x 2 D operations each."""

    def build(self) -> None:
        self.read_width = 2 * self.config.width
        self.pooling = PairPooling(self.config.width)

    def project(self, event_x: Tensor) -> Rows:
        return (event_x,)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        return self.pooling(rows[0], requests, candidate_x)

    def numbers(self, num_candidates: int, num_events: int) -> int:
        return numbers_of_unit(num_candidates, num_events, self.config.width)
