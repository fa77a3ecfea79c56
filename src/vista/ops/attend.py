"""Softmax attention with its log-sum-exp, in one pass on a CPU: what reads of several sources are merged by.

A read of two sources at once is the mean of their own reads, weighted by the softmax of their log-sum-exps; so each
source can be attended to by itself, in torch's fused kernel, which never writes a logit. No gradient: the kernel has
none for the log-sum-exp nor for the bias.

Shape letters: Q requests, C rows that ask, n rows of a source, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vista.ops.forms import uses_tiles

LEAST_BIAS = -1e30  # stands for minus infinity: a source of nothing but that has no NaN, and no weight

Source = tuple[Tensor, Tensor]  # what was read (Q, H, C, E), and its log-sum-exp (Q, H, C) float32


def pays(q: Tensor) -> bool:
    """Whether `attend` may run: on a CPU, where no gradient is asked for."""
    return uses_tiles(q) and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def attend_naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Source:
    """softmax(q k^T + bias) v and the logarithm of the sum of exp(q k^T + bias): the definition of `attend`."""
    logits = (q @ k.transpose(-2, -1)).float() + (0 if bias is None else bias)
    return logits.softmax(-1).to(v.dtype) @ v, logits.logsumexp(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Source:
    """q (Q, H, C, E), k, v (Q, H, n, E) with n > 0, bias (Q, H, C or 1, n), LEAST_BIAS or more, contiguous, or it is
    copied."""
    mask = None if bias is None else bias.to(q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=1.0)


def merge(sources: Sequence[Source]) -> Tensor:
    """What is read of all sources at once, (Q, H, C, E)."""
    weights = torch.stack([log_sum for _, log_sum in sources], -1).softmax(-1)
    read = None
    for (mine, _), weight in zip(sources, weights.to(sources[0][0].dtype).split(1, -1), strict=True):
        read = mine * weight if read is None else read.addcmul_(mine, weight)
    assert read is not None
    return read
