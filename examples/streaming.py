"""A summary that is kept up to date event by event, and equals the one computed from the whole history at once.

python examples/streaming.py
"""

from __future__ import annotations

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.config import resolve
from vista.models.embeddings import EventEmbedding, ItemEmbedding, ItemTables
from vista.models.inputs import Events
from vista.models.summarizer import Summarizer

NUM_ITEMS, NUM_EVENTS = 500, 1_000


def make_summarizer() -> Summarizer:
    """A fresh one; `vista.load(RUN).summarizer` is a trained one."""
    torch.manual_seed(0)
    config = resolve("tiny").model
    catalogue = Catalogue(ids=np.arange(NUM_ITEMS), embedding_row=np.arange(65 + NUM_ITEMS, dtype=np.int32))
    items = ItemEmbedding(ItemTables.of(catalogue), config.width)
    return Summarizer(config, EventEmbedding(items, num_actions=2, width=config.width)).eval()


def some_history(rng: np.random.Generator) -> Events:
    times = 1_600_000_000_000_000 + np.cumsum(rng.integers(1, 10**10, NUM_EVENTS))
    return Events.from_log(
        item=torch.from_numpy(rng.integers(65, 65 + NUM_ITEMS, NUM_EVENTS)),
        action=torch.from_numpy(rng.integers(1, 3, NUM_EVENTS)),
        timestamp_us=torch.from_numpy(times),
        offsets=torch.tensor([0, NUM_EVENTS]),
    )


def one_event(events: Events, place: int) -> Events:
    row = slice(place, place + 1)
    return Events.from_log(events.item[row], events.action[row], events.timestamp_us[row], torch.tensor([0, 1]))


@torch.no_grad()
def main() -> None:
    summarizer, events = make_summarizer(), some_history(np.random.default_rng(0))
    at_once = summarizer(events)
    state = summarizer.init_state(1)
    for place in range(NUM_EVENTS):
        state = summarizer.extend(state, one_event(events, place))
    streamed = summarizer.read(state)
    state_bytes = sum(t.numel() * t.element_size() for layer in state.memory for memory in layer for t in memory)
    shape = tuple(streamed.shape[1:])
    print(f"{NUM_EVENTS} events, one at a time: {shape} summary tokens, {state_bytes:,} bytes of memory")
    print(f"largest difference from reading the history at once: {(streamed - at_once).abs().max():.1e}")


if __name__ == "__main__":
    main()
