"""Gated delta rule: a linear map from keys to values that each event corrects at its own key.

With a unit key k, a value v, a step b in (0, 1) and a share a in (0, 1] of what is kept, one head (Yang et al.,
"Gated Delta Networks", arXiv 2412.06464, equation 10, transposed):

    D_n = a_n (I - b_n k_n k_n^T) D_{n-1} + b_n k_n v_n^T ;  read(q) = D^T q for a unit query q

The newest event at a key overwrites what was there by the share b, so the order of events matters. What a segment does
to D is affine, D -> A D + B, and A and B depend on its own events alone: they are its part, and merging applies it.

A and B are worked out for CHUNK_EVENTS at a time in matrix products (the WY form of a product of reflections), with
ratios of shares that never exceed 1; both forms in float64, as the same segment may come ten thousand times and an
error in A would be raised to that power.

The naive form is the definition, the other the one models use; values and gradients are equal (tests/ops).

Shape letters: B users, G segments (of all users together), S rows of a segment, H heads, E head width, F value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.ops.ridge import unit

CHUNK_EVENTS = 64  # worked out at once: the triangular system is of this size, so that cost grows with S alone


def delta_naive(k: Tensor, v: Tensor, step: Tensor, log_share: Tensor, start: Tensor | None = None) -> Tensor:
    """The definition, one head: k (N, E), v (N, F), step b (N,), log_share log a (N,), to D (E, F)."""
    state = v.new_zeros(k.shape[-1], v.shape[-1]) if start is None else start
    for key, value, b, log_a in zip(unit(k), v, step, log_share, strict=True):
        state = log_a.exp() * (state - b * torch.outer(key, key @ state)) + b * torch.outer(key, value)
    return state


def delta_parts(k: Tensor, v: Tensor, step: Tensor, log_share: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """A (G, H, E, E) and B (G, H, E, F), float64, of segments: k (G, H, S, E), v (G, H, S, F), step and log_share
    (G, H, S), is_valid (G, S)."""
    key, value = unit(k.double()), v.double()
    step, log_share = (x.double() * is_valid[:, None, :] for x in (step, log_share))
    part = None
    for start in range(0, max(k.shape[2], 1), CHUNK_EVENTS):
        rows = slice(start, start + CHUNK_EVENTS)
        chunk = _chunk(key[:, :, rows], value[:, :, rows], step[:, :, rows], log_share[:, :, rows])
        part = chunk if part is None else (chunk[0] @ part[0], chunk[0] @ part[1] + chunk[1])
    assert part is not None
    return part


def _chunk(key: Tensor, value: Tensor, step: Tensor, log_share: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a chunk.

    Row n adds k_n u_n^T with u_n = b_n (v_n - a_n D_{n-1}^T k_n). With c the running product of shares that is the
    triangular system (I + L) u = b v - b c K D_0, L_nm = b_n (c_n / c_m) k_n . k_m for m < n.
    """
    total = log_share.cumsum(-1)
    ratio = (total[..., :, None] - total[..., None, :]).tril().exp()
    lower = (step[..., None] * ratio * (key @ key.mT)).tril(-1)
    from_start = (step * total.exp())[..., None] * key
    right = torch.cat([from_start, step[..., None] * value], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    kept = ratio[..., -1, :, None] * key  # what is left of each row's key at the end
    from_start, added = (kept.mT @ solved).split([key.shape[-1], value.shape[-1]], -1)
    identity = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    return total[..., -1, None, None].exp() * identity - from_start, added


def merge_delta(running: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
    """D (B, H, E, F) after one more segment."""
    return part[0].to(running.dtype) @ running + part[1].to(running.dtype)


def ask_delta(readout: Tensor, q: Tensor) -> Tensor:
    """q (..., rows, E) and D (..., E, F) to reads (..., rows, F) in q's type."""
    return (unit(q.double()) @ readout.double()).to(q.dtype)
