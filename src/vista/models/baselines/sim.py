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

The exact stage weighs all raw events and leaves out what was not found: fetching k events for each candidate costs more
than it saves as long as k D > R H.

Shape letters: N event rows, Q requests, C candidates, R raw events, W events of a window, k events chosen, T tasks, D
width, H heads, E head width, A width of the time embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.models.baselines.base import Baseline, Rows, Window, masked_softmax
from vista.models.baselines.din import PairPooling, numbers_of_unit
from vista.models.batch import Memory, Output, Requests, TimelineBatch
from vista.models.embeddings import GAP_BUCKETS, SIDE_SCALE
from vista.models.layers import aligned, norm
from vista.models.ranker import SAME_ITEM_LOGIT

AGE_WIDTH = 8  # A: of the vector of a time interval


class SIM(Baseline):
    """Cost of a request: hard C x R comparisons, soft C x R dot products of width D; then C x R of them, exact."""

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
        numbers = self.config.width * (self.config.width + candidate_x.shape[1])
        pooled = self.by_pieces(self.soft.pool, rows, batch.requests, candidate_x, numbers)
        return Output(logits, last, auxiliary=self.soft.head(torch.cat([pooled, norm(candidate_x)], -1)).float())

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        window = Window.of(requests)
        e, k = (r[window.rows] for r in rows[:2])
        age = window.age_bucket[..., None]
        age = e.new_zeros(*age.shape[:2], GAP_BUCKETS).scatter_(2, age, 1.0)  # (Q, W, buckets), one of them 1
        q = self._by_head(self.query(candidate_x))  # (Q, C, H, D)
        by_age = (q @ self.age_key(self.age.weight).T).flatten(1, 2) @ age.transpose(1, 2)  # (Q, C H, W)
        logits = q @ k.T + by_age.unflatten(1, q.shape[1:3])
        logits = logits + window.is_same_item(requests)[:, :, None] * self.same_item[:, None]
        is_read = self.search(rows, window, requests, candidate_x)[:, :, None]
        weight = masked_softmax(logits, is_read).to(e.dtype)
        by_age = (weight.flatten(1, 2) @ age).unflatten(1, q.shape[1:3]) @ self.age.weight
        long_term = norm(torch.cat([weight @ e, by_age], -1)).flatten(2)
        newest = requests.newest(min(self.config.recent_events, requests.recent.shape[1]))
        return torch.cat([long_term, self.short_term(rows[0], newest, candidate_x)], -1)

    @torch.no_grad()
    def search(self, rows: Rows, window: Window, requests: Requests, candidate_x: Tensor) -> Tensor:
        """Whether an event is among the k that are read for a candidate, (Q, C, W)."""
        if self.soft is not None:
            return window.best(self.soft.score(rows, window, candidate_x), self.config.top_k)
        wanted, category = self.category(requests.candidate), self.category(window.item)
        is_found = (wanted[:, :, None] == category[:, None]) & (category > 0)[:, None]
        return window.only(is_found, self.config.top_k)

    def category(self, item: Tensor) -> Tensor:
        """What hard search compares: 0 for nothing."""
        features = self.embedding.items.features
        return features[item, 0] if features.shape[1] else item

    def numbers(self, num_candidates: int, num_events: int) -> int:
        newest = min(self.config.recent_events, num_events)
        exact = num_events * (num_candidates * (self.config.num_heads + 1) + GAP_BUCKETS)
        return exact + numbers_of_unit(num_candidates, newest, self.config.width)

    def _by_head(self, q: Tensor) -> Tensor:
        """(..., D) to (..., H, D), scaled: zero outside a head's own E, so that one product with keys serves all."""
        heads, width = self.config.num_heads, self.config.width // self.config.num_heads
        own = torch.eye(heads, device=q.device, dtype=q.dtype).repeat_interleave(width, 1)
        return q[..., None, :] * (own * width**-0.5)


class SoftSearch(nn.Module):
    """r_b = (W_b e_b) . (W_a e_a), and the head on U_r that trains it."""

    def __init__(self, width: int, head_width: int, num_tasks: int) -> None:
        super().__init__()
        self.query, self.key = aligned(width), aligned(width)
        self.head = nn.Sequential(nn.Linear(2 * width, head_width), nn.SiLU(), nn.Linear(head_width, num_tasks))

    def score(self, rows: Rows, window: Window, candidate_x: Tensor) -> Tensor:
        """r (Q, C, W)."""
        return self.query(candidate_x) @ rows[2][window.rows].T

    def pool(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        """arsinh(U_r), (Q, C, D): the sum over events is one matrix per request, whatever the candidate."""
        window = Window.of(requests)
        k, e = rows[2][window.rows], rows[0][window.rows]
        of_each = (k[:, :, None] * e[:, None]).flatten(1)  # (W, D D)
        matrix = (window.is_there.to(e.dtype) @ of_each).unflatten(1, (k.shape[1], e.shape[1]))
        return torch.asinh(self.query(candidate_x) @ matrix)
