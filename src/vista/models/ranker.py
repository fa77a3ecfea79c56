"""Stage 2: candidates attend to [summary tokens; recent events; self], and to nothing else.

Keys and values of tokens and recent events do not depend on the candidate: they are computed once, and C candidates
cost C x (K + R), whatever the length of the history. The paper's stage 2 has the tokens and the candidate alone,
because its stage 1 is refreshed with the candidate's request or within hours; ours has the recent events, to bridge
the time since the tokens were read. Ours, too: the attention *mass* on tokens and on recent events (a log-sum-exp per
head), added to what is read, because a softmax alone can tell what matched but not how much of it there was. And each
candidate may ask a memory itself (`candidate_memory`), so that its answer does not have to pass through K tokens that
were read without knowing who would ask.

Shape letters: M summaries, K summary tokens, N event rows, R recent events, Q requests, C candidates, H heads, E head
width, D width, X context columns, T tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vista.config import ModelConfig
from vista.models.batch import Requests
from vista.models.embeddings import GAP_BUCKETS, ContextEncoder, gap_bucket
from vista.models.head import Head
from vista.models.layers import GatedUnit, aligned, join_heads, norm, project_normed, split_heads
from vista.models.memory import ASKABLE
from vista.ops import attend
from vista.schema import ContextColumn

POSITION_BUCKETS = 24  # floor(log2(1 + place from the newest)): enough for R of 16 million
SAME_ITEM_LOGIT = 2.0  # added where a recent event is of the candidate's own item: exact where embeddings are not yet
LOGIT_SCALE = 2.0  # of a fresh attention head: an equal item stands out of some hundred others


class TargetAttention(nn.Module):
    """One pre-norm block in which candidates read the context; the context's rows stay as they are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (aligned(config.width) for _ in range(4))
        self.log_scale = nn.Parameter(torch.full((config.num_heads,), math.log(LOGIT_SCALE)))
        self.age_bias = nn.Embedding(GAP_BUCKETS, config.num_heads)
        self.position_bias = nn.Embedding(POSITION_BUCKETS, config.num_heads)
        self.same_item = nn.Parameter(torch.full((config.num_heads,), SAME_ITEM_LOGIT))
        nn.init.zeros_(self.age_bias.weight)
        nn.init.zeros_(self.position_bias.weight)
        self.mass = nn.Linear(2 * config.num_heads, config.width, bias=False)
        nn.init.normal_(self.mass.weight, std=0.02)
        self.unit = GatedUnit(config.width, config.expansion)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Context rows (..., n, D) to keys and values (..., H, n, E), shared by all candidates."""
        k, v = project_normed(rows, self.key, self.value)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(
        self,
        x: Tensor,
        tokens: tuple[Tensor, Tensor],
        recent: tuple[Tensor, Tensor],
        bias: Tensor,
        same: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """x (Q, C, D); keys and values of tokens (Q, H, K, E) and recent events (Q, H, R, E); bias (Q, H, C or 1, R);
        same (Q, 1, C, R): 1 where a recent event is of the candidate's item, else 0; None for nowhere.

        seen: takes the attention weights (Q, H, C, K + R + 1) on tokens, recent events and the candidate itself.
        """
        projected = project_normed(x, self.query, self.key, self.value)
        q, k_self, v_self = (split_heads(t, self.num_heads) for t in projected)
        q = q * (self.log_scale.exp() * q.shape[-1] ** -0.5)[:, None, None].to(q.dtype)
        if seen is None and attend.pays(q):
            read, mass = self._read(q, k_self, v_self, tokens, recent, bias, same)
        else:
            read, mass = self._read_by_definition(q, k_self, v_self, tokens, recent, bias, same, seen)
        x = x + self.dropout(self.out(join_heads(read)) + self.mass(mass.transpose(1, 2).to(x.dtype)))
        drops = self.training and self.dropout.p > 0
        return x + self.dropout(self.unit(norm(x))) if drops else self.unit.added(x)

    def _read_by_definition(
        self, q: Tensor, k_self: Tensor, v_self: Tensor, tokens: tuple[Tensor, Tensor], recent: tuple[Tensor, Tensor],
        bias: Tensor, same: Tensor | None, seen: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What candidates read (Q, H, C, E), and the masses on tokens and on recent events (Q, 2 H, C)."""
        on_tokens = (q @ tokens[0].transpose(-2, -1)).float()
        if same is not None:
            bias = bias + same * self.same_item[:, None, None]
        on_recent = (q @ recent[0].transpose(-2, -1)).float() + bias
        on_self = (q * k_self).sum(-1, keepdim=True).float()
        weight = torch.cat([on_tokens, on_recent, on_self], -1).softmax(-1).to(q.dtype)
        if seen is not None:
            seen.append(weight)
        w_tokens, w_recent, w_self = weight.split([tokens[0].shape[-2], recent[0].shape[-2], 1], -1)
        read = w_tokens @ tokens[1] + w_recent @ recent[1] + w_self * v_self
        return read, torch.cat([_log_mass(on_tokens), _log_mass(on_recent)], 1)

    def _read(
        self, q: Tensor, k_self: Tensor, v_self: Tensor, tokens: tuple[Tensor, Tensor], recent: tuple[Tensor, Tensor],
        bias: Tensor, same: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same without gradients on a CPU: source by source, no logit is written."""
        bias = bias.clamp(min=attend.LEAST_BIAS).contiguous()  # while it is small: what is added to it has its layout
        if same is not None:
            bias = torch.addcmul(bias, same, self.same_item[:, None, None])
        sources, masses = [(v_self, (q * k_self).sum(-1).float())], []
        for source, logit in ((tokens, None), (recent, bias)):
            if not source[0].shape[-2]:
                masses.append(q.new_zeros(q.shape[:-1]))
                continue
            sources.append(attend.attend(q, *source, logit))
            masses.append(softplus(sources[-1][1]))
        return attend.merge(sources), torch.cat(masses, 1)


def _log_mass(logits: Tensor) -> Tensor:
    """log(1 + sum of exp): 0 where there is nothing to attend to, so that an empty history is an ordinary value."""
    return torch.cat([logits.new_zeros(*logits.shape[:-1], 1), logits], -1).logsumexp(-1)


@dataclass(frozen=True)
class UserCache:
    """What is computed once per user: keys and values of tokens and of recent events, one pair per block; and what
    candidates ask, (M, H, E, columns), None where they ask nothing."""

    tokens: tuple[tuple[Tensor, Tensor], ...]
    recent: tuple[tuple[Tensor, Tensor], ...]
    readout: Tensor | None = None


class CandidateQuestion(nn.Module):
    """What a memory answers to a candidate: what it read, how like the candidate that is, and the mass if there is one.

    The likeness is the mean over a head of read x own value: an event of the very item had nearly that value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.memory = config.num_heads, ASKABLE[config.candidate_memory]
        self.query, self.value, self.out = (aligned(config.width) for _ in range(3))
        self.facts = nn.Linear((1 + self.memory.has_mass) * config.num_heads, config.width, bias=False)

    def forward(self, candidate_x: Tensor, readout: Tensor) -> Tensor:
        """candidate_x (Q, C, D) and readout (Q, H, E, columns) to what is added to the candidates, (Q, C, D)."""
        h = norm(candidate_x)
        q, own = (split_heads(p(h), self.num_heads) for p in (self.query, self.value))
        read, mass = self.memory.ask(readout, q)
        facts = (read * own).mean(-1).transpose(1, 2)
        if mass is not None:
            facts = torch.cat([facts, mass.to(facts.dtype)], -1)
        return self.out(join_heads(read)) + self.facts(facts)


class Ranker(nn.Module):
    """Candidates x (summary tokens, recent events) to one logit per task."""

    def __init__(
        self, config: ModelConfig, num_tasks: int, context: tuple[ContextColumn, ...], num_counts: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TargetAttention(config) for _ in range(config.ranker_layers))
        self.question = CandidateQuestion(config) if config.has_candidate_memory else None
        encoder = ContextEncoder(context)
        self.target = nn.Parameter(0.1 * torch.randn(config.width))
        self.head = Head(config, encoder, config.width, num_tasks, num_counts)

    def prepare(self, tokens: Tensor, event_x: Tensor, readout: Tensor | None = None) -> UserCache:
        """Summary tokens (M, K, D) and event vectors (N, D), to their keys and values; readout as candidates ask it."""
        recent = []
        for block in self._blocks:
            k, v = block.keys_values(event_x)  # (H, N, E)
            recent.append((k.transpose(0, 1), v.transpose(0, 1)))  # rows first, to be gathered
        return UserCache(tuple(block.keys_values(tokens) for block in self._blocks), tuple(recent), readout)

    def forward(
        self, cache: UserCache, requests: Requests, candidate_x: Tensor, seen: list[Tensor] | None = None
    ) -> Tensor:
        """Logits (Q, C, T). candidate_x (Q, C, D): the candidates' item vectors; seen: takes each block's attention."""
        index, is_absent = requests.recent.clamp(min=0), requests.recent < 0
        age = gap_bucket((requests.timestamp_us[:, None] - requests.recent_us).clamp(min=0))
        same = (requests.candidate[:, None, :, None] == requests.recent_item[:, None, None, :]).float()
        x = candidate_x + self.target
        if self.question is not None:
            assert cache.readout is not None
            x = x + self.question(candidate_x, cache.readout[requests.summary])
        for block, tokens, recent in zip(self._blocks, cache.tokens, cache.recent, strict=True):
            bias = self._bias(block, age, is_absent)
            k, v = (_gather(rows, index) for rows in recent)
            x = block(x, tuple(t[requests.summary] for t in tokens), (k, v), bias, same, seen)
        return self.head(norm(x), candidate_x, requests)

    @property
    def _blocks(self) -> list[TargetAttention]:
        return list(self.blocks)  # type: ignore[arg-type]

    @staticmethod
    def _bias(block: TargetAttention, age: Tensor, is_absent: Tensor) -> Tensor:
        """(Q, H, 1, R): by age and by place, and minus infinity where there is no event."""
        size = age.shape[1]
        place = torch.arange(size, 0, -1, device=age.device).float().log2().floor().long()
        bias = block.age_bias(age) + block.position_bias(place)
        return bias.masked_fill(is_absent[..., None], float("-inf")).transpose(1, 2)[:, :, None, :]


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (N, H, E), index (Q, R), to (Q, H, R, E)."""
    if not rows.shape[0]:
        return rows.new_zeros(index.shape[0], rows.shape[1], index.shape[1], rows.shape[2])
    return rows[index].transpose(1, 2)
