"""Which events wrote which summary token.

With memory ``slots`` a token reads, per layer and head, one softmax over all events of closed segments. The state keeps
that softmax's numerator, denominator and maximum, so the *share* of an event is known exactly once its key is: where
there is one layer, from the event alone; where there are more, from all events before it as well, since events of a
deeper layer have read each other. Other memories are no weighted means of events, and have no shares.

Shape letters: N events, G segments, S events in a segment, H heads, K summary tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vista.models.inputs import Events
from vista.models.summarizer import Summarizer, SummarizerLayer, UserState
from vista.ops.order import SegmentOrder

BLOCK_SEGMENTS = 64  # traced at a time


def why_no_shares(summarizer: Summarizer | None) -> str:
    """Empty where events have shares in tokens; else the reason, a sentence."""
    if summarizer is None:
        return "This model has no summary tokens; it reads recent events alone."
    config = summarizer.config
    if config.scope == "full":
        return "A summary of scope 'full' is read from all events anew; no memory holds their shares."
    if config.memory != "slots":
        return f"A memory of kind '{config.memory}' is no weighted mean of events; no event has a share in a token."
    return ""


@torch.no_grad()
def token_shares(summarizer: Summarizer, state: UserState, events: Events) -> Iterator[Tensor]:
    """The shares (K, n) of one user's events in each token, a block of events after the other, oldest first.

    events: of closed segments; with more than one layer, all of them, from the first on. Means over layers and heads:
    over all events of closed segments they add up to 1. Only where ``why_no_shares`` has nothing to say.
    """
    size = summarizer.config.segment_events
    number = len(events.item)
    index = torch.arange(-(-number // size) * size).view(-1, size)
    index[index >= number] = -1
    layers: list[SummarizerLayer] = list(summarizer.layers)  # type: ignore[arg-type]
    running = list(summarizer.init_state(1).memory)
    for block in index.split(BLOCK_SEGMENTS):
        segments = summarizer.segments_of(events, None, block)
        order = SegmentOrder.of(torch.tensor([len(block)]))
        rows, total = segments.x, torch.zeros(len(block), summarizer.config.num_seeds, size)
        for place, layer in enumerate(layers):
            shares = layer.shares(rows, state.memory[place])
            assert shares is not None
            total += shares.mean(1) / len(layers)
            if place + 1 < len(layers):
                after, _, running[place] = layer.fold(rows, segments.is_valid, order, running[place])
                assert after is not None
                rows = after
        yield total.transpose(0, 1).flatten(1)[:, segments.is_valid.flatten()]
