"""Quasi-linear attention (QLA): the paper's operator, and our segment-causal form of it.

Paper: arXiv 2510.22049, section 3 (QLU). With phi = SiLU and Z = phi(K_S)^T V_S, one head:

    O_S = phi(Q_S) phi(Z)
    O_T = phi(Q_T) phi(Z) + rowsum(phi(Q_T) * phi(K_T)) * V_T     a target sees the sources and itself, no other target

Ours, for a history cut into segments of S events (design: "segment-causal"):

    Z_g = phi(K_g)^T V_g ;  M_g = M_{g-1} + Z_g ;  O_g = phi(Q_g) phi(norm(M_g))

With one segment that holds everything (S = infinity) and no norm, O_g is the paper's O_S.

Each operator stands here twice: ``*_naive`` is the definition, one history and plain loops, meant to be read and to be
tested against; the other form is the one models use. On a GPU that form runs the kernels of `vista.ops.triton_qla` and
`vista.ops.triton_scan`, on a CPU the tiles of `vista.ops.tiled`, elsewhere torch (`vista.ops.forms`). Values and
gradients of all are equal (tests/ops).

Shape letters: B users, G segments (of all users together), S rows of a segment, H heads, E head width, F value width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from vista.ops import tiled
from vista.ops.forms import uses_kernels, uses_tiles
from vista.ops.order import SegmentOrder

Norm = Callable[[Tensor], Tensor]


def no_norm(memory: Tensor) -> Tensor:
    """The paper's choice: the memory as it is."""
    return memory


NORM_EPS = 1e-6


def rms_norm(memory: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Memory (..., E, F) divided by the root mean square of its entries: removes the growth with the number of events.

    The paper suggests a factor 1/N for the linear form and leaves open where it goes with an outer activation;
    dividing by the measured size instead also holds when keys repeat (then the memory grows like N, else like
    sqrt(N)).
    """
    return memory * torch.rsqrt(memory.square().mean(dim=(-2, -1), keepdim=True) + eps)


def qla(
    q_s: Tensor, k_s: Tensor, v_s: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor, norm: Norm = no_norm
) -> tuple[Tensor, Tensor]:
    """The paper's operator. Sources (..., n, E|F) and targets (..., m, E|F) to (..., n, F) and (..., m, F).

    ``norm`` is applied to Z before the outer activation (not in the paper; default none). A padded source row must
    have a zero key: SiLU(0) = 0, so it adds nothing.
    """
    memory = silu(norm(silu(k_s).transpose(-2, -1) @ v_s))
    phi_q_t = silu(q_t)
    self_weight = (phi_q_t * silu(k_t)).sum(-1, keepdim=True)
    return silu(q_s) @ memory, phi_q_t @ memory + self_weight * v_t


def qla_naive(
    q_s: Tensor, k_s: Tensor, v_s: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor, norm: Norm = no_norm
) -> tuple[Tensor, Tensor]:
    """The definition of ``qla``, one head without leading dimensions, row by row."""
    z = torch.zeros(k_s.shape[-1], v_s.shape[-1], dtype=v_s.dtype)
    for key, value in zip(k_s, v_s, strict=True):
        z = z + torch.outer(silu(key), value)
    memory = silu(norm(z))
    o_s = [silu(query) @ memory for query in q_s]
    o_t = [
        silu(query) @ memory + (silu(query) @ silu(key)) * value
        for query, key, value in zip(q_t, k_t, v_t, strict=True)
    ]
    return _stack(o_s, v_s), _stack(o_t, v_t)


def segment_causal_qla_naive(
    q: Tensor, k: Tensor, v: Tensor, segment_events: int, norm: Norm = rms_norm, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition for one history and head: q, k (N, E), v (N, F), to the outputs (N, F) and the memory (E, F)."""
    if memory is None:
        memory = torch.zeros(k.shape[-1], v.shape[-1], dtype=v.dtype)
    outputs = []
    for start in range(0, len(q), segment_events):
        rows = slice(start, start + segment_events)
        for key, value in zip(k[rows], v[rows], strict=True):
            memory = memory + torch.outer(silu(key), value)
        outputs += [silu(query) @ silu(norm(memory)) for query in q[rows]]
    return _stack(outputs, v), memory


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros(0, like.shape[-1])


RESIDUE_STEP = 2.0**-24 / 125  # of the total: rounding loses at most 2^-24 of it, 125 steps, which int8 holds


def add_compensated(total: Tensor, residue: Tensor, part: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """total * scale + part, and what rounding it to float32 has lost, so that the next addition makes it good.

    total, part (...) float32; residue (...) int8, in units of total x RESIDUE_STEP; scale broadcasts, None for 1. This
    is Kahan's compensated sum with a residue of one byte. The errors of many additions cancel where events differ, but
    not where they are all alike: the same part rounds the same way each time. With one item for a lifetime of 4e5 to
    1e6 events, plain float32 sums were off by 6e-5 and the tokens read from them by 3e-4 (relative); compensated, by
    6e-7 and 4e-6 (tests/models/test_precision.py). A float64 total is the reference of that and needs no residue.
    """
    total = total if scale is None else total * scale
    if total.dtype == torch.float64:
        return total + part, residue
    addend = torch.add(part, residue * total.detach(), alpha=RESIDUE_STEP)
    after = total + addend
    lost = addend.detach() - (after.detach() - total.detach())
    # a total of 0 loses no share of it; past the clamp: an addend that outweighs the total, early in a history
    steps = lost.div_(after.detach()).mul_(1 / RESIDUE_STEP).nan_to_num_(0.0).round_().clamp_(-127, 127)
    return after, steps.to(torch.int8)


def widened(total: Tensor, residue: Tensor) -> Tensor:
    """A compensated sum as float64, in which many parts can be added without a residue."""
    return total.double() * (1 + residue.double() * RESIDUE_STEP) if total.dtype != torch.float64 else total.clone()


def narrowed(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reverse: the sum rounded to ``dtype``, and what that has lost as an int8 residue (see add_compensated)."""
    total = wide.to(dtype)
    steps = (wide - total).div_(total).mul_(1 / RESIDUE_STEP).nan_to_num_(0.0).round_().clamp_(-127, 127)
    return total, steps.to(torch.int8)


def carried(x: Tensor) -> Tensor:
    """In the type memory is carried in: float32, or float64 where the model itself is (a reference for tests)."""
    return x if x.dtype == torch.float64 else x.float()


def merge_sums(running: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The running value (total, residue) of a sum memory after one more part (sum,)."""
    return add_compensated(*running, *part)


def scan_sums(
    order: SegmentOrder, running: tuple[Tensor, ...], parts: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``order.scan`` of `merge_sums`."""
    if uses_kernels(parts[0]):
        from vista.ops.triton_scan import scan

        return scan(order, running, parts)
    if uses_tiles(parts[0]):
        return tiled.scan(order, merge_sums, running, parts)
    return order.scan(merge_sums, running, parts)


def segment_sums(k: Tensor, v: Tensor, is_valid: Tensor | None = None) -> Tensor:
    """Z_g = phi(K_g)^T V_g as `carried`. k (G, H, S, E), v (G, H, S, F), is_valid (G, S), default all: (G, H, E, F).

    The sum over all events is thus blocked: S products are summed from zero, and that sum is added to the memory once.
    A row's rounding error is relative to its segment's sum, not to the whole memory; what adding the segments' sums
    loses is carried along (`add_compensated`).
    """
    if uses_kernels(k, v):
        from vista.ops.triton_qla import SegmentSums

        return SegmentSums.apply(k, v, is_valid)
    if uses_tiles(k, v):
        return tiled.SegmentSums.apply(k, v, is_valid)
    if is_valid is not None:
        k = k * is_valid[:, None, :, None]
    return carried(silu(k).transpose(-2, -1) @ v)


def read_memory(q: Tensor, memory: Tensor, norm: Norm = rms_norm) -> Tensor:
    """phi(Q) phi(norm(M)): q (..., rows, E), memory (..., E, F) float32, to (..., rows, F) in q's type."""
    if q.ndim == memory.ndim == 4 and norm in (rms_norm, no_norm):
        eps = NORM_EPS if norm is rms_norm else None
        if uses_kernels(q, memory):
            from vista.ops.triton_qla import ReadMemory

            return ReadMemory.apply(q, memory, eps)
        if uses_tiles(q, memory):
            return tiled.ReadMemory.apply(q, memory, eps)
    return silu(q) @ silu(norm(memory)).to(q.dtype)


def segment_causal_qla(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, order: SegmentOrder, norm: Norm = rms_norm
) -> tuple[Tensor, Tensor, Tensor]:
    """Segment-causal QLA over the segments of many users at once.

    q, k (G, H, S, E), v (G, H, S, F); zero key rows where a segment is padded; memory (B, H, E, F) float32 before them.
    Returns the outputs (G, H, S, F), the memory after each segment (G, H, E, F), and after all, (B, H, E, F).
    """
    running = memory, torch.zeros_like(memory, dtype=torch.int8)
    (after_segment, _), (last, _) = scan_sums(order, running, (segment_sums(k, v),))
    return read_memory(q, after_segment, norm), after_segment, last
