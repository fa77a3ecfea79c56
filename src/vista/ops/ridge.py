"""Ridge memory: the linear map from keys to values that fits all events best, kept as two sums.

With unit keys k and values v of all events, one head, and a strength l > 0 in events:

    G = sum of k k^T ;  M = sum of k v^T ;  read(q) = M^T (G + l I)^-1 q ;  leverage(q) = l q^T (G + l I)^-1 q

Read is what ridge regression predicts for a unit query q: a key that came a thousand times weighs no more than one that
came ten times, so repetition does not drown the rest. Leverage is 1 where no event had a key like q, and about l / n
where n had it.

Sums are float64 and so is the solve: the condition of G + l I grows with the number of events, and what a float32 sum
loses in a million events is more than l in a direction no event had. As [G, M] they are one tensor.

The naive form is the definition, the other the one models use; values and gradients are equal (tests/ops).

Shape letters: G segments (of all users together), S rows of a segment, H heads, E head width, F value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_EPS = 1e-6  # beside a key's squared length: a zero key stays zero
LEAST_LEVERAGE = 1e-9  # what its logarithm begins at: a thousand million events with one key


def unit(x: Tensor) -> Tensor:
    """Rows (..., E) of length 1; zero rows stay zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + KEY_EPS)


def ridge_read_naive(q: Tensor, k: Tensor, v: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The definition, one head: q (rows, E), k (N, E), v (N, F), to reads (rows, F) and leverages (rows,)."""
    gram = strength * torch.eye(q.shape[-1], dtype=q.dtype)
    moment = q.new_zeros(q.shape[-1], v.shape[-1])
    for key, value in zip(unit(k), v, strict=True):
        gram = gram + torch.outer(key, key)
        moment = moment + torch.outer(key, value)
    solved = torch.linalg.inv(gram)
    queries = unit(q)
    return queries @ solved @ moment, strength * torch.stack([query @ solved @ query for query in queries])


def ridge_parts(k: Tensor, v: Tensor, is_valid: Tensor) -> Tensor:
    """[G, M] of segments: k (G, H, S, E), v (G, H, S, F), is_valid (G, S), to (G, H, E, E + F) float64."""
    key = unit(k.double()) * is_valid[:, None, :, None]
    return key.transpose(-2, -1) @ torch.cat([key, v.double()], -1)


def ridge_readout(sums: Tensor, strength: Tensor) -> Tensor:
    """What queries are multiplied with: sums (..., H, E, E + F), strength (H,), to (..., H, E, F + E) float64.

    The first F columns give the read, the length of what the others give is the root of the leverage.
    """
    width = sums.shape[-2]
    gram, moment = sums.double().split([width, sums.shape[-1] - width], -1)
    strength = strength.double()[:, None, None]
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky(gram + strength * identity)
    half = torch.linalg.solve_triangular(lower.mT, identity.expand_as(gram), upper=True)
    return torch.cat([half @ (half.mT @ moment), strength.sqrt() * half], -1)


def ask_ridge(readout: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """q (..., rows, E) and `ridge_readout` (..., E, F + E) to reads (..., rows, F) in q's type, and the logarithm of
    1 / leverage (..., rows) float32: 0 where nothing was like q, about log(n / strength) where n events were."""
    width = q.shape[-1]
    both = unit(q.double()) @ readout.double()
    read, half = both.split([both.shape[-1] - width, width], -1)
    leverage = half.square().sum(-1)
    return read.to(q.dtype), -(leverage + LEAST_LEVERAGE).log().to(torch.promote_types(q.dtype, torch.float32))
