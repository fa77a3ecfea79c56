"""Why a candidate got its score: what the ranker attended to, what exact counts say, and the score without each source.

All of it comes out of the model's own code. Attention weights are those of the pass that gave the scores, as means over
heads and blocks. They say where the ranker looked, not what followed from it; so there are three more scores:

- without the summary: tokens and read-out of an empty history instead;
- without recent events: none of them attended to or counted;
- without counts: the sketch of an empty history instead (recent events are counted even so).

Shape letters: C candidates, T tasks, K summary tokens, R recent events, J levels of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vista.models.batch import Requests
from vista.models.sketch import HALF_LIVES_S
from vista.serving.deployment import Model
from vista.serving.scorer import Asked, UserSummaries


@dataclass(frozen=True)
class Counted:
    """What the sketch and the recent events say of candidates, at one level: events (C,), 0 where it was never met;
    events_since and seconds_since (C,) the newest. feature: name of the item feature that is counted, None for items.
    """

    feature: str | None
    events: np.ndarray
    events_since: np.ndarray
    seconds_since: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """probability (C, T); on_tokens (C, K), on_recent (C, R), on_itself (C,): weights that add up to 1 per candidate.

    without: probability (C, T) by the name of the source that is left out; only sources the model has.
    meetings_after: (C, R), how many of the newest meetings with a candidate came right after that event's item.
    """

    model: Model
    summaries: UserSummaries
    probability: np.ndarray
    on_tokens: np.ndarray
    on_recent: np.ndarray
    on_itself: np.ndarray
    without: dict[str, np.ndarray]
    counted: list[Counted]
    meetings_after: np.ndarray
    is_known_item: np.ndarray
    is_degraded: bool


@torch.no_grad()
def explain(model: Model, summaries: UserSummaries, asked: Asked, is_degraded: bool) -> Explanation:
    """The explanation of one user's candidates. summaries: of that user alone."""
    sequence = model.scorer.model
    requests = model.scorer.request_of(summaries, asked)
    prepared = sequence.prepare_users(summaries.tokens, summaries.recent, summaries.sketch, summaries.readout)
    seen: list[Tensor] = []
    probability = sequence.rank(prepared, requests, seen)[0].double().sigmoid().numpy()
    weight = torch.stack(seen).mean((0, 2))[0].double().numpy()  # (C, K + R + 1)
    number = summaries.tokens.shape[1]
    return Explanation(
        model, summaries, probability, weight[:, :number], weight[:, number:-1], weight[:, -1],
        {name: model.scorer.score(other, [asked])[0] for name, other in _without(model, summaries).items()},
        _counted(model, summaries, requests), _meetings_after(model, summaries, requests),
        asked.index >= model.run.catalogue.first_item, is_degraded,
    )  # fmt: skip


def _without(model: Model, summaries: UserSummaries) -> dict[str, UserSummaries]:
    """What would have been read, had one of the sources been empty."""
    sequence, found = model.scorer.model, {}
    if summaries.tokens.shape[1]:
        empty = model.scorer.cold(1)
        found["summary"] = replace(summaries, tokens=empty.tokens, readout=empty.readout)
    # times stay: the age of the newest event is no attention
    recent = replace(summaries.recent, item=torch.zeros_like(summaries.recent.item))
    found["recent_events"] = replace(summaries, recent=recent)
    if sequence.sketch is not None:
        found["counts"] = replace(summaries, sketch=sequence.init_sketch(1))
    return found


def _counted(model: Model, summaries: UserSummaries, requests: Requests) -> list[Counted]:
    """The sketch's own features of each candidate, taken back from their logarithms."""
    sketch = model.scorer.model.sketch
    if sketch is None:
        return []
    facts = sketch.read(summaries.sketch, requests, model.scorer.model.embedding.items.features)[0].double()
    names = model.run.catalogue.feature_names
    width = 4 + len(HALF_LIVES_S)
    found = []
    for number, level in enumerate(sketch.levels):
        values = facts[:, number * width : (number + 1) * width].numpy()
        events, events_since, seconds_since = (np.rint(np.expm1(values[:, column])) for column in (1, 2, 3))
        is_met = values[:, 0] > 0
        feature = None if level.feature is None else names[level.feature]
        found.append(Counted(feature, np.where(is_met, events, 0), events_since, seconds_since))
    return found


def _meetings_after(model: Model, summaries: UserSummaries, requests: Requests) -> np.ndarray:
    sketch = model.scorer.model.sketch
    if sketch is None or not sketch.num_predecessors:
        return np.zeros((requests.candidate.shape[1], requests.recent_item.shape[1]), np.int64)
    return sketch.meetings_after(summaries.sketch, requests)[0].numpy()
