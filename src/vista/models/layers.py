"""Small parts shared by the summarizer, the ranker and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from vista.ops import dense

ALIGNED_NOISE = 0.02  # standard deviation around the identity


def norm(x: Tensor) -> Tensor:
    """x / (||x|| / sqrt(D)): TransNormer's norm, no weights."""
    return rms_norm(x, (x.shape[-1],))


def aligned(width: int) -> nn.Linear:
    """A square projection that starts near the identity.

    Queries, keys and values of equal items then match from the first step; with random ones the linear memory was
    measured to stay at chance.
    """
    linear = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(width) + ALIGNED_NOISE * torch.randn(width, width))
    return linear


class GatedUnit(nn.Module):
    """SGLU: [(x W_v) * (x W_u)] W_o (paper, after TransNormerLLM). (..., D) to (..., D); starts at zero output."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.value_and_gate = nn.Linear(width, 2 * expansion * width, bias=False)
        self.out = nn.Linear(expansion * width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.value_and_gate(x).chunk(2, -1)
        return self.out(value * gate)

    def added(self, x: Tensor) -> Tensor:
        """x + SGLU(norm x)."""
        weights = self.value_and_gate.weight, self.out.weight
        if dense.pays(x, *weights):
            return dense.AddUnit.apply(x.reshape(-1, x.shape[-1]), *weights).view(x.shape)
        return x + self(norm(x))


def project_normed(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Projections without bias of norm(x): (..., D) to (..., columns) each."""
    weights = [linear.weight for linear in linears]
    if dense.pays(x, *weights):
        made = dense.Project.apply(x.reshape(-1, x.shape[-1]), *weights)
        return tuple(t.view(*x.shape[:-1], t.shape[-1]) for t in made)
    h = norm(x)
    return tuple(linear(h) for linear in linears)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., rows, D) to (..., H, rows, E)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, rows, E) to (..., rows, D)."""
    return x.transpose(-3, -2).flatten(-2)


def small_lookup(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a small table (n, H) at index (...), heads first: (H, ...).

    ``nn.Embedding`` gives the same; on a CPU its gradient adds up row by row, eighteen times as slow with one head.
    """
    flat = index.flatten()
    return torch.stack([column.index_select(0, flat) for column in weight.unbind(1)]).view(
        weight.shape[1], *index.shape
    )
