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
from vista.records import fill_recent
from vista.store.contract import SummaryStore
from vista.store.record import Record, decode, user_key

US_PER_S = 1_000_000


@dataclass(frozen=True)
class UserSummaries:
    """What the store holds of B users: tokens (B, K, D) float32, recent events (B, R), and how current they are.

    num_events (B,) int64; as_of_us (B,) int64, -1 for a cold start; is_known (B,) bool.
    """

    tokens: torch.Tensor
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

    @torch.no_grad()
    def read(self, users: Sequence[Any]) -> UserSummaries:
        """Tokens and recent events of users by original id. Raises StoreError for a damaged or misfit record."""
        config = self.run.config.model
        blobs = self.store.get_many("tokens", [user_key(user) for user in users], self.run.version)
        tokens = self.model.empty_summary(len(users)).clone()
        recent = Recent.empty(len(users), config.recent_events)
        num_events = torch.zeros(len(users), dtype=torch.int64)
        as_of_us = torch.full((len(users),), -1, dtype=torch.int64)
        for row, (user, blob) in enumerate(zip(users, blobs, strict=True)):
            if blob is None:
                continue
            record = self._decode(user, blob)
            if record.arrays["tokens"].shape != tuple(tokens.shape[1:]):
                raise StoreError(
                    f"user {user!r}: tokens of shape {record.arrays['tokens'].shape} in the store, the model's are "
                    f"{tuple(tokens.shape[1:])}; summarize again"
                )
            tokens[row] = torch.from_numpy(record.arrays["tokens"].astype(np.float32))
            fill_recent(recent, row, record)
            num_events[row], as_of_us[row] = record.num_events, record.as_of_us
        return UserSummaries(tokens, recent, num_events, as_of_us, np.array([blob is not None for blob in blobs]))

    def _decode(self, user: Any, blob: bytes) -> Record:
        try:
            record = decode(blob, self.run.version)
        except RecordError as error:
            raise RecordError(f"user {user!r}: {error}") from error
        if (record.kind, record.user_key) != ("tokens", user_key(user)):
            raise RecordError(
                f"user {user!r}: the store has a record of kind {record.kind!r} of user {record.user_key!r} in this "
                "place; summarize again"
            )
        return record

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
