"""The scorer: user ids and candidate ids in, one probability per task out, from the store. No network, no histories.

Per user, summary tokens and recent events are read once and shared by all candidates, so the cost does not depend on
how long the history is.

A user the store does not know is a *cold start*: the summary of an empty history, no recent events, and the model's own
answer to that. An item the catalogue does not know is scored by its unknown bucket. Both are said in the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vista.checkpoint import Run
from vista.errors import RecordError, StoreError
from vista.models.inputs import Recent
from vista.models.memory import Running
from vista.records import fill_recent, fill_sketch
from vista.store.contract import SummaryStore
from vista.store.record import Stored, decode_tokens, unpack, user_key

US_PER_S = 1_000_000


@dataclass(frozen=True)
class UserSummaries:
    """What the store holds of B users: tokens (B, K, D) float32, sketches (B, ...) where the model has them, recent
    events (B, R), and how current they are.

    num_events (B,) int64; as_of_us (B,) int64, -1 for a cold start; is_known (B,) bool.
    """

    tokens: torch.Tensor
    sketch: Running
    recent: Recent
    num_events: torch.Tensor
    as_of_us: torch.Tensor
    is_known: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Scores of one user's candidates.

    probability (C, T); is_known_item (C,) bool; is_known_user; num_events and as_of_us of the summary (0 and -1 in a
    cold start).
    """

    probability: np.ndarray
    is_known_item: np.ndarray
    is_known_user: bool
    num_events: int
    as_of_us: int


class Scorer:
    """Ranks from one run and one store. Reads only records of the run's own model version."""

    def __init__(self, run: Run, store: SummaryStore) -> None:
        self.run, self.store, self.model = run, store, run.sequence_model
        self._popularity = run.read_popularity()
        with torch.no_grad():
            self._shape = tuple(self.model.empty_summary(1).shape[1:])

    @torch.no_grad()
    def read(self, users: Sequence[Any]) -> UserSummaries:
        """Tokens and recent events of users by original id. Raises StoreError for a damaged or misfit record."""
        blobs = self.store.get_many("tokens", [user_key(user) for user in users], self.run.version)
        pairs = enumerate(zip(users, blobs, strict=True))
        found = {row: self._unpack(user, blob) for row, (user, blob) in pairs if blob is not None}
        recent = Recent.empty(len(users), self.run.config.model.recent_events)
        sketch = self.model.init_sketch(len(users))
        num_events, as_of_us = [0] * len(users), [-1] * len(users)
        for row, stored in found.items():
            if sketch:
                fill_sketch(sketch, row, stored)
            fill_recent(recent, row, stored)
            num_events[row], as_of_us[row] = stored.num_events, stored.as_of_us
        return UserSummaries(
            self._decode(len(users), found),
            sketch,
            recent,
            torch.tensor(num_events, dtype=torch.int64),
            torch.tensor(as_of_us, dtype=torch.int64),
            np.array([blob is not None for blob in blobs]),
        )

    def _decode(self, num_users: int, found: dict[int, Stored]) -> torch.Tensor:
        """Tokens (B, K, D) from the records by row, all of a codec at once; a cold start where there is none."""
        codecs = {stored.codec for stored in found.values()}
        if len(found) == num_users and len(codecs) == 1:
            tokens = torch.empty(num_users, *self._shape)
            decode_tokens(list(found.values()), out=tokens.numpy())
            return tokens
        tokens = self.model.empty_summary(num_users).clone()
        for codec in codecs:
            rows = [row for row, stored in found.items() if stored.codec == codec]
            tokens[rows] = torch.from_numpy(decode_tokens([found[row] for row in rows]))
        return tokens

    def _unpack(self, user: Any, blob: bytes) -> Stored:
        try:
            stored = unpack(blob, self.run.version)
        except RecordError as error:
            raise RecordError(f"user {user!r}: {error}") from error
        if (stored.kind, stored.user_key) != ("tokens", user_key(user)):
            raise RecordError(
                f"user {user!r}: the store has a record of kind {stored.kind!r} of user {stored.user_key!r} in this "
                "place; summarize again"
            )
        if stored.arrays["tokens"].shape != self._shape:
            raise StoreError(
                f"user {user!r}: tokens of shape {stored.arrays['tokens'].shape} in the store, the model's are "
                f"{self._shape}; summarize again"
            )
        return stored

    @torch.no_grad()
    def rank(
        self,
        users: Sequence[Any],
        candidates: Sequence[Sequence[Any]],
        at_us: int | None = None,
        context: Sequence[np.ndarray] | None = None,
    ) -> list[Ranking]:
        """Score each user's candidates (original ids), as of ``at_us`` (microseconds since 1970 UTC; default now).

        context: per user (C, X) float32 as prepared data holds it, columns in the order of the run's schema, NaN
        where a value is not given. Raises StoreError as ``read`` does. """  # fmt: skip
        summaries = self.read(users)
        lengths = [len(own) for own in candidates]
        width, num_context = max(lengths, default=0), len(self.run.schema.context)
        candidate = torch.zeros(len(users), width, dtype=torch.int64)
        contexts = torch.full((len(users), width, num_context), torch.nan)
        for row, own in enumerate(candidates):
            candidate[row, : len(own)] = torch.from_numpy(self.run.catalogue.encode(list(own)).astype(np.int64))
            if context is not None:
                contexts[row, : len(own)] = torch.from_numpy(np.asarray(context[row], np.float32))
        at_us = time.time_ns() // 1000 if at_us is None else at_us
        logits = self.model.rank_users(
            summaries.tokens,
            summaries.recent,
            summaries.num_events,
            torch.full((len(users),), at_us, dtype=torch.int64),
            candidate,
            contexts,
            summaries.sketch,
            None if self._popularity is None else self._popularity[candidate],
        )
        probability = logits.double().sigmoid().numpy()
        is_known_item = candidate.numpy() >= self.run.catalogue.first_item
        return [
            Ranking(
                probability[row, :length],
                is_known_item[row, :length],
                bool(summaries.is_known[row]),
                int(summaries.num_events[row]),
                int(summaries.as_of_us[row]),
            )
            for row, length in enumerate(lengths)
        ]
