"""Leave-one-out: of each user the last event is test, the one before it validation, the rest training.

    train        every event of the rest is predicted from those before it, the newest ``length`` of them
    validation   the event before the last, from all before it
    test         the last event, from all before it, the validation event included

Shape letters: B users, N events, P queries, V items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vista.data.arrays import ragged_rows
from vista.data.sequences import Sequences
from vista.models.inputs import Events
from vista.models.next_item import NextItemBatch

Part = Literal["train", "validation", "test"]
HELD_BACK = {
    "train": 3,
    "validation": 2,
    "test": 1,
}  # newest events that are not read


@dataclass(frozen=True)
class LeaveOneOut:
    """Batches of a log. length: newest events asked for in training; reads: newest events given; None: all."""

    sequences: Sequences
    length: int
    reads: int | None

    def num_read(self, users: np.ndarray, part: Part) -> np.ndarray:
        """Events given of each user, (B,)."""
        known = self.sequences.offsets[users + 1] - self.sequences.offsets[users] - HELD_BACK[part]
        return known if self.reads is None else np.minimum(known, self.reads)

    def batch(self, users: np.ndarray, part: Part) -> tuple[NextItemBatch, Tensor]:
        """A batch of users (B,), and the items it asks for, (P,): in training many of each user, else one."""
        sequences, lengths = self.sequences, self.num_read(users, part)
        row = ragged_rows(sequences.offsets[users + 1] - HELD_BACK[part] - lengths, lengths)
        offsets = np.concatenate([[0], lengths.cumsum()])
        item, time = torch.from_numpy(sequences.item), torch.from_numpy(sequences.timestamp_us)
        known, following = torch.from_numpy(row), torch.from_numpy(row + 1)
        events = Events.from_log(item[known], torch.zeros_like(known), time[known], torch.from_numpy(offsets))
        num_asked = np.minimum(lengths, self.length if part == "train" else 1)
        asked = torch.from_numpy(ragged_rows(offsets[1:] - num_asked, num_asked))
        return NextItemBatch(events, time[following], asked), item[following][asked]

    def seen(self, users: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Row in ``users`` and item of what is not ranked: the newest ``length`` events before the target."""
        offsets = self.sequences.offsets
        ends = offsets[users + 1] - HELD_BACK[part]
        counts = np.minimum(ends - offsets[users], self.length)
        return np.repeat(np.arange(len(users)), counts), self.sequences.item[ragged_rows(ends - counts, counts)]

    def target(self, users: np.ndarray, part: Part) -> np.ndarray:
        """The item asked for at the end, (B,)."""
        return self.sequences.item[self.sequences.offsets[users + 1] - HELD_BACK[part]]

    def counts(self) -> np.ndarray:
        """How often each item is in the training part, (V + 1,)."""
        offsets = self.sequences.offsets
        rows = ragged_rows(offsets[:-1], np.diff(offsets) - HELD_BACK["validation"])
        return np.bincount(self.sequences.item[rows], minlength=self.sequences.num_items + 1)
