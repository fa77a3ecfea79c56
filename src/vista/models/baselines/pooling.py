"""``mean``: the mean of the event vectors, whatever the candidate: the Embedding & MLP model that DIN is compared with.

Ours: the mean instead of the sum; the parts named in ``base``. There is nothing between an event and a candidate, so
no age, place or own item is told.

Shape letters: N event rows, Q requests, C candidates, R raw events, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vista.models.baselines.base import Baseline, Rows, beside_product
from vista.models.batch import Requests


class MeanPooling(Baseline):
    """Candidates read mean_j v_j; zero where there is no event. Cost of a request: R D to read, C D to compare."""

    def build(self) -> None:
        self.read_width = 2 * self.config.width

    def project(self, event_x: Tensor) -> Rows:
        return (event_x,)

    def read(self, rows: Rows, requests: Requests, candidate_x: Tensor) -> Tensor:
        absent = len(rows[0]) - 1
        index = torch.where(requests.recent < 0, absent, requests.recent)
        mean = embedding_bag(index, rows[0], mode="mean", padding_idx=absent)
        return beside_product(mean[:, None].expand_as(candidate_x), candidate_x)

    def numbers(self, num_candidates: int, num_events: int) -> int:
        return num_events + num_candidates * 2 * self.config.width
