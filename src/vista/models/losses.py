"""Losses: what is asked of the ranker, of the summary, and of a next-item query.

Shape letters: P windows or queries, W events of a window, K summary tokens, D width, Q requests, C candidates, T tasks,
V items, J items drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, scaled_dot_product_attention

from vista.config import ModelConfig
from vista.models.layers import GatedUnit, aligned, join_heads, norm, split_heads

QUERIES_AT_ONCE = 256  # measured: 256 x 3,416 logits beat 512 by a third, and all at once far more
PRODUCTS_PER_ROW = 100  # of a matrix product with all items cost as much as fetching one item's row (measured, D = 50)


def multi_task_loss(logits: Tensor, label: Tensor, is_valid: Tensor) -> Tensor:
    """Mean binary cross-entropy over impressions and tasks. logits, label (Q, C, T); is_valid (Q, C)."""
    return binary_cross_entropy_with_logits(logits[is_valid], label[is_valid].float())


def sampled_softmax(query: Tensor, items: Tensor, target: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """Sum over queries of -log softmax of the target among itself and the items drawn for it, but those equal to it.

    query (P, D), items (V + 1, D), target (P,) and drawn (P, J) rows of items. In pieces of queries, so that what lies
    between stays in a core's cache.
    """
    losses = [
        _sampled_softmax(q, t, d, items, temperature)
        for q, t, d in zip(*(x.split(QUERIES_AT_ONCE) for x in (query, target, drawn)), strict=True)
    ]
    return torch.stack(losses).sum() if losses else query.sum()


def _sampled_softmax(query: Tensor, target: Tensor, drawn: Tensor, items: Tensor, temperature: float) -> Tensor:
    index = torch.cat([target[:, None], drawn], 1)
    if len(items) <= PRODUCTS_PER_ROW * index.shape[1]:
        logits = (query @ items.T).gather(1, index)
    else:
        logits = (items[index] @ query[:, :, None]).squeeze(-1)
    is_target = torch.cat([torch.zeros_like(target, dtype=torch.bool)[:, None], drawn == target[:, None]], 1)
    logits = logits.float().masked_fill(is_target, -torch.inf) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).sum()


class ReconstructionDecoder(nn.Module):
    """A small causal decoder over (summary tokens, events of a window) that predicts each next event vector.

    Paper: L = sum over i of ||v_i - u_{i+1}||^2, weight 1.0, over the whole history. Ours: the target is detached and
    normed (or the loss is won by shrinking embeddings), the mean is taken instead of the sum (so that the weight
    means the same at every width and window length), and the window is drawn at a random age, so that the cost does
    not grow with the history. Dropped at export.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor, event_x: Tensor, is_valid: Tensor) -> Tensor:
        """tokens (P, K, D), event_x (P, W, D), is_valid (P, W), to the mean squared error per window, (P,)."""
        x = torch.cat([tokens, event_x], 1)
        for block in self.blocks:
            x = block(x)
        predicted = self.out(norm(x[:, tokens.shape[1] :]))[:, :-1]
        error = (predicted - norm(event_x[:, 1:]).detach()).float().square().mean(-1)
        counted = is_valid[:, 1:] & is_valid[:, :-1]
        return (error * counted).sum(1) / counted.sum(1).clamp(min=1)


class DecoderBlock(nn.Module):
    """Causal softmax attention, then SGLU, both pre-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (aligned(config.width) for _ in range(4))
        self.unit = GatedUnit(config.width, config.expansion)

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x)
        q, k, v = (split_heads(p(h), self.num_heads) for p in (self.query, self.key, self.value))
        x = x + self.out(join_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + self.unit(norm(x))
