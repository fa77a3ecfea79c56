"""``sim``: search, then attend, after Pi et al. 2020, "Search-based User Interest Modeling".

Paper, section 3, for a candidate a and events e_b:

    search, hard   events of a's category                                  (equation 1)
    search, soft   the k largest (W_b e_b) . (W_a e_a), trained by a loss of its own: a head on
                   U_r = sum_b r_b e_b, added to the main loss with weight 1
    exact          z_b = [e_b; embedding of the time from b to the request]
                   head_i = softmax_b(W_bi z_b . W_ai e_a) z_b             multi-head target attention
                   U_lt = [head_1; ...; head_H]
    short term     DIN over the newest events                              (the paper: DIEN, a GRU)

Ours: hard search keeps the newest k of the category, the first categorical feature of the catalogue; where a catalogue
has none, the category of an item is the item itself. An unknown category is none, and finds nothing. Logits are divided
by sqrt(E), the candidate's own item has a bias, heads are normed, U_r goes through arsinh as in ``din``. Short term is
DIN over the newest ``recent_events``, since a GRU is a peer of the search in no comparison we make. Beside it, the
parts named in ``base``.

Shape letters: N event rows, Q requests, C candidates, R raw events, k events chosen, T tasks, D width, H heads, E head
width, A width of the time embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.models.baselines.base import (
    Baseline,
    Rows,
    age_bucket,
    along,
    is_same_item,
    masked_softmax,
    take,
)
from vista.models.baselines.din import PairPooling, numbers_of_unit
from vista.models.batch import Memory, Output, Requests, TimelineBatch
from vista.models.embeddings import GAP_BUCKETS, SIDE_SCALE
from vista.models.layers import aligned, norm
from vista.models.ranker import SAME_ITEM_LOGIT

AGE_WIDTH = 8  # A: of the vector of a time interval


class SIM(Baseline):
    """Cost of a request: hard C x R comparisons, soft C x R dot products of width D; then C x k of them, exact."""

    def build(self) -> None:
        config = self.config
        self.query, self.key = aligned(config.width), aligned(config.width)
        self.age = nn.Embedding(GAP_BUCKETS, AGE_WIDTH)
        nn.init.normal_(self.age.weight, std=SIDE_SCALE)
        self.age_key = nn.Linear(AGE_WIDTH, config.width, bias=False)  # with ``key``, the paper's W_b on [e; time]
        self.same_item = nn.Parameter(torch.full((config.num_heads,), SAME_ITEM_LOGIT))
        self.short_term = PairPooling(config.width)
        self.read_width = config.num_heads * (config.width + AGE_WIDTH) + 2 * config.width
        self.soft = SoftSearch(config.width, config.head_width, self.num_tasks) if config.search == "soft" else None

    def project(self, event_x: Tensor) -> Rows:
        rows = (event_x, self.key(event_x))
        return rows if self.soft is None else (*rows, self.soft.key(event_x))

    def forward(self, batch: TimelineBatch, memory: Memory) -> Output:
        rows, last = self.prepare(batch, memory)
        logits = self.rank(rows, batch.requests)
        if self.soft is None or not self.training:
            return Output(logits, last)
        candidate_x = self.embedding.items(batch.requests.candidate)
        pooled = self.by_pieces(self.soft.pool, rows, batch.requests, candidate_x)
        return Output(logits, last, auxiliary=self.soft.head(torch.cat([pooled, norm(candidate_x)], -1)).float())

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        with torch.no_grad():
            chosen, is_there = self.search(rows, requests, candidate_x)
        index = along(requests.recent, chosen).masked_fill(~is_there, -1)
        e = take(rows[0], index)  # (Q, C, k, D)
        age = along(age_bucket(requests), chosen)
        k = self._heads(take(rows[1], index) + nn.functional.embedding(age, self.age_key(self.age.weight)))
        q = self._heads(self.query(candidate_x))
        logits = torch.einsum("qche,qckhe->qckh", q, k) * q.shape[-1] ** -0.5
        logits = logits + is_same_item(requests).gather(2, chosen)[..., None] * self.same_item
        weight = masked_softmax(logits.transpose(2, 3), is_there[:, :, None]).to(e.dtype)
        long_term = norm(weight @ torch.cat([e, self.age(age)], -1)).flatten(2)
        newest = requests.newest(min(self.config.recent_events, requests.recent.shape[1]))
        return torch.cat([long_term, self.short_term(rows[0], newest, candidate_x)], -1)

    def search(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the k best events among the raw ones, and whether they are events and were found, (Q, C, k)."""
        k = min(self.config.top_k, requests.recent.shape[1])
        if self.soft is not None:
            score = self.soft.score(rows, requests, candidate_x)
            chosen = score.masked_fill((requests.recent < 0)[:, None], -torch.inf).topk(k, -1).indices
            return chosen, along(requests.recent, chosen) >= 0
        wanted, category = self.category(requests.candidate), self.category(requests.recent_item)
        is_found = (wanted[:, :, None] == category[:, None]) & (category > 0)[:, None]
        place = torch.arange(1, category.shape[1] + 1, device=category.device)
        newest = (is_found * place).topk(k, -1)
        return newest.indices, newest.values > 0

    def category(self, item: Tensor) -> Tensor:
        """What hard search compares: 0 for nothing."""
        features = self.embedding.items.features
        return features[item, 0] if features.shape[1] else item

    def numbers(self, num_candidates: int, num_events: int) -> int:
        chosen, newest = min(self.config.top_k, num_events), min(self.config.recent_events, num_events)
        exact = num_candidates * (num_events + chosen * (2 * self.config.width + AGE_WIDTH))
        return exact + num_events * self.config.width + numbers_of_unit(num_candidates, newest, self.config.width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1))


class SoftSearch(nn.Module):
    """r_b = (W_b e_b) . (W_a e_a), and the head on U_r that trains it."""

    def __init__(self, width: int, head_width: int, num_tasks: int) -> None:
        super().__init__()
        self.query, self.key = aligned(width), aligned(width)
        self.head = nn.Sequential(nn.Linear(2 * width, head_width), nn.SiLU(), nn.Linear(head_width, num_tasks))

    def score(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        """r (Q, C, R)."""
        return self.query(candidate_x) @ take(rows[2], requests.recent).transpose(1, 2)

    def pool(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        """arsinh(U_r), (Q, C, D): the sum over events is one matrix per request, whatever the candidate."""
        matrix = take(rows[2], requests.recent).transpose(1, 2) @ take(rows[0], requests.recent)
        return torch.asinh(self.query(candidate_x) @ matrix)
