"""``twin``: search and exact stage with one target attention, after Chang et al. 2023, "TWIN".

Paper, equations 5 to 8, per head, with K_h what is inherent in an event and K_c what user and event share:

    alpha = (K_h W_h)(q W_q)^T / sqrt(E) + K_c beta      the search keeps the k largest
    read  = softmax(alpha over those k)^T K W_v          heads side by side, then W_o

The search scores by the very alpha that then weighs, so nothing that would matter is lost to another measure of
similarity; K_h W_h does not depend on the candidate and is made once per event.

Ours: K_c beta is a bias by age, by place and for the candidate's own item, our cross features. All heads keep the same
k events, those of the largest mean alpha (the paper does not say how heads share a search). Choosing passes no
gradient. The alphas of the search are those of the exact stage, too: made once, and left out where not chosen, since
fetching k events for each candidate costs more than it saves as long as k D > R H. Beside it, the parts named in
``base``.

Shape letters: N event rows, Q requests, C candidates, R raw events, W events of a window, k events chosen, D width, H
heads, E head width.
"""

from __future__ import annotations

from torch import Tensor

from vista.models.baselines.base import (
    Baseline,
    Rows,
    SideBias,
    Window,
    beside_product,
    masked_softmax,
    match,
    weigh,
)
from vista.models.batch import Requests
from vista.models.layers import aligned, norm, split_heads


class TWIN(Baseline):
    """Cost of a request: C x R dot products of width D, for the search and for the exact stage."""

    def build(self) -> None:
        config = self.config
        self.read_width = 2 * config.width
        self.query, self.key, self.value, self.out = (aligned(config.width) for _ in range(4))
        self.bias = SideBias(config.num_heads)

    def project(self, event_x: Tensor) -> Rows:
        h = norm(event_x)
        return self.key(h), self.value(h)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        heads, window = self.config.num_heads, Window.of(requests)
        k, v = (split_heads(r[window.rows], heads) for r in rows)  # (H, W, E)
        q = self.query(norm(candidate_x)) * (self.config.width // heads) ** -0.5
        alpha = match(split_heads(q, heads).transpose(0, 1), k) + self.bias(window, window.is_same_item(requests))
        chosen = window.best(alpha.detach().mean(0), self.config.top_k)
        read = weigh(masked_softmax(alpha, chosen).to(v.dtype), v)
        return beside_product(self.out(read.permute(1, 2, 0, 3).flatten(2)), candidate_x)

    def numbers(self, num_candidates: int, num_events: int) -> int:
        return num_candidates * num_events * (self.config.num_heads + 1)
