"""``twin``: search and exact stage with one target attention, after Chang et al. 2023, "TWIN".

Paper, equations 5 to 8, per head, with K_h what is inherent in an event and K_c what user and event share:

    alpha = (K_h W_h)(q W_q)^T / sqrt(E) + K_c beta      the search keeps the k largest
    read  = softmax(alpha over those k)^T K W_v          heads side by side, then W_o

The search scores by the very alpha that then weighs, so nothing that would matter is lost to another measure of
similarity; K_h W_h does not depend on the candidate and is made once per event.

Ours: K_c beta is a bias by age, by place and for the candidate's own item, our cross features. All heads keep the same
k events, those of the largest mean alpha (the paper does not say how heads share a search), so that an event is
fetched once for all. Choosing passes no gradient. Beside it, the parts named in ``base``.

Shape letters: N event rows, Q requests, C candidates, R raw events, k events chosen, D width, H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vista.models.baselines.base import (
    Baseline,
    Rows,
    SideBias,
    age_bucket,
    along,
    beside_product,
    is_same_item,
    masked_softmax,
    place_bucket,
    take,
)
from vista.models.batch import Requests
from vista.models.layers import aligned, norm


class TWIN(Baseline):
    """Cost of a request: C x R dot products of width D for the search, then C x k of them."""

    def build(self) -> None:
        config = self.config
        self.read_width = 2 * config.width
        self.query, self.key, self.value, self.out = (aligned(config.width) for _ in range(4))
        self.bias = SideBias(config.num_heads)

    def project(self, event_x: Tensor) -> Rows:
        h = norm(event_x)
        return self.key(h), self.value(h)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        q = self._heads(self.query(norm(candidate_x)))  # (Q, C, H, E)
        chosen = self.search(rows[0], requests, q)
        index = along(requests.recent, chosen)
        k, v = (self._heads(take(r, index)) for r in rows)  # (Q, C, k, H, E)
        age, place, is_same = self._sides(requests)
        bias = self.bias(along(age, chosen), place[chosen], is_same.gather(2, chosen))
        alpha = torch.einsum("qche,qckhe->qckh", q, k) * q.shape[-1] ** -0.5 + bias
        weight = masked_softmax(alpha.transpose(2, 3), (index >= 0)[:, :, None]).to(v.dtype)
        read = torch.einsum("qchk,qckhe->qche", weight, v).flatten(2)
        return beside_product(self.out(read), candidate_x)

    @torch.no_grad()
    def search(self, keys: Tensor, requests: Requests, q: Tensor) -> Tensor:
        """The places (Q, C, k) among the raw events of the k with the largest mean alpha; absent ones come last."""
        k = take(keys, requests.recent)
        flat = q.flatten(2) * (q.shape[-1] ** -0.5 / q.shape[2])  # the mean over heads is one product of width D
        age, place, is_same = self._sides(requests)
        mean = flat @ k.transpose(1, 2) + self.bias(age[:, None], place, torch.zeros_like(age[:, None])).mean(-1)
        mean = mean + is_same * self.bias.same_item.mean()
        mean = mean.masked_fill((requests.recent < 0)[:, None], -torch.inf)
        return mean.topk(min(self.config.top_k, mean.shape[-1]), -1).indices

    def numbers(self, num_candidates: int, num_events: int) -> int:
        chosen = min(self.config.top_k, num_events)
        return num_candidates * (num_events + 2 * chosen * self.config.width) + num_events * self.config.width

    @staticmethod
    def _sides(requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
        """Age buckets (Q, R), place buckets (R,), own item (Q, C, R)."""
        place = place_bucket(requests.recent.shape[1], requests.recent.device)
        return age_bucket(requests), place, is_same_item(requests)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1))
