"""``sasrec``: causal self-attention over events, after Kang & McAuley 2018, "Self-Attentive Sequential Recommendation".

Paper, section 3, per block, with g each of attention and feed-forward network:

    x = x + Dropout(g(LayerNorm(x)))      S = softmax(Q K^T / sqrt(E), causal) V      FFN = ReLU(x W_1 + b_1) W_2 + b_2
    r_(i,t) = F_t . M_i                   the newest event's row and the item's own (tied) embedding

Ours: instead of a learned embedding per position, a learned bias per distance in the logits, so that a row means the
same wherever its window begins (see ``causal``). The paper's score and our head are added, since tasks are clicks of
shown items rather than the next item among all; row and item are normed, with a learned scale per task. Several heads
(``num_heads``; the paper: 1). Beside it, the parts named in ``base``.

Shape letters: B lanes or requests, n rows of each, Q requests, C candidates, R raw events, T tasks, D width, H heads,
E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.models.baselines.base import Rows, beside_product, take
from vista.models.baselines.causal import Block, CausalBaseline, Stretches, attend_in_blocks
from vista.models.batch import Requests
from vista.models.layers import join_heads, small_lookup, split_heads

SCORE_SCALE = 0.1  # of a fresh model's r . M: untrained items must not outweigh the head


class SASRecBlock(nn.Module):
    """Attention, then the feed-forward network, both on a LayerNorm and added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.distance = nn.Embedding(config.history_events, config.num_heads)
        nn.init.zeros_(self.distance.weight)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, of: Stretches, first: int = 0) -> Tensor:
        """Rows (B, n, D) to the rows from ``first`` on, (B, n - first, D)."""
        h = self.before_attention(x)
        q, k, v = (split_heads(p(h), self.num_heads) for p in (self.query, self.key, self.value))

        def attend(block: Block) -> Tensor:
            logits = q[:, :, block.rows] @ k[:, :, block.keys].transpose(-2, -1) * q.shape[-1] ** -0.5
            logits = logits + small_lookup(self.distance.weight, block.distance)
            weight = logits.masked_fill(~block.is_seen, -torch.inf).float().softmax(-1)
            return weight.to(v.dtype) @ v[:, :, block.keys]

        x = x[:, first:] + self.dropout(join_heads(attend_in_blocks(attend, of, first)))
        h = self.before_network(x)
        return x + self.dropout(self.second(self.dropout(self.first(h).relu())))


def encode_rows(blocks: Sequence[SASRecBlock], x: Tensor, of: Stretches, first: int = 0) -> Tensor:
    """Event vectors (B, n, D) through all blocks, the rows from ``first`` on: (B, n - first, D)."""
    for block in blocks[:-1]:
        x = block(x, of)
    return blocks[-1](x, of, first)


class SASRec(CausalBaseline):
    """Cost of a request: encoding R rows, R^2 D per block; then C x D."""

    def build(self) -> None:
        self.read_width = 2 * self.config.width
        self.blocks = nn.ModuleList(SASRecBlock(self.config) for _ in range(self.config.encoder_layers))
        self.last_norm = nn.LayerNorm(self.config.width)
        self.scale = nn.Parameter(torch.full((self.num_tasks,), SCORE_SCALE))

    def rank(self, prepared: Rows, requests: Requests) -> Tensor:
        candidate_x = self.embedding.items(requests.candidate)
        read = self.by_pieces(self.read, prepared, requests, candidate_x)
        score = read[..., self.config.width :].float().sum(-1, keepdim=True) * self.config.width**-0.5
        return self.head(read, candidate_x, requests) + self.scale * score

    def encode(self, x: Tensor, of: Stretches) -> Rows:
        return (self.last_norm(encode_rows(self._blocks, x, of)),)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        if self.training:
            newest = take(rows[0], requests.recent[:, -1:])
        else:
            newest = self._encode_newest(take(rows[0], requests.recent), requests)
        newest = newest * (requests.recent[:, -1:] >= 0)[..., None]
        return beside_product(newest.expand_as(candidate_x), candidate_x)

    def numbers(self, num_candidates: int, num_events: int) -> int:
        reading = num_candidates * 2 * self.config.width
        return reading if self.training else reading + self.numbers_of_encoding(num_events)

    def _encode_newest(self, x: Tensor, requests: Requests) -> Tensor:
        """As ``encode``, (Q, 1, D): in the last block the newest row alone, since nobody reads the others."""
        of = Stretches(requests.recent_us, requests.recent >= 0, self.config.history_events)
        return self.last_norm(encode_rows(self._blocks, x, of, x.shape[1] - 1))

    @property
    def _blocks(self) -> list[SASRecBlock]:
        return list(self.blocks)  # type: ignore[arg-type]
