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
from vista.models.batch import Requests
from vista.models.inputs import Recent
from vista.models.memory import Running
from vista.records import fill_readout, fill_recent, fill_sketch
from vista.serving.cache import Decoded, TokenCache
from vista.store.contract import SummaryStore
from vista.store.record import Record, Stored, decode, decode_tokens, unpack, user_key

CANDIDATES_AT_ONCE = 8192  # in one pass: with 200 events and tokens and 4 heads, attention takes 26 MB
ROW_WIDTHS = (16, 64, 256, 1024, CANDIDATES_AT_ONCE)
ROW_COST = 32  # of a row, in candidates: copies of its user's keys and values


@dataclass(frozen=True)
class UserSummaries:
    """What the store holds of B users: tokens (B, K, D) float32, sketches (B, ...) and read-outs (B, H, E, columns)
    where the model has them, recent events (B, R), and how current they are.

    num_events (B,) int64; as_of_us (B,) int64, -1 for a cold start; is_known (B,) bool.
    """

    tokens: torch.Tensor
    sketch: Running
    recent: Recent
    num_events: torch.Tensor
    as_of_us: torch.Tensor
    is_known: np.ndarray
    readout: torch.Tensor | None = None


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


@dataclass(frozen=True)
class Asked:
    """The candidates of one user: item indices (C,) int, the moment asked about, and context (C, X) float32 or None."""

    index: np.ndarray
    at_us: int
    context: np.ndarray | None = None


class Scorer:
    """Ranks from one run and one store. Reads only records of the run's own model version. Threads may share it."""

    def __init__(self, run: Run, store: SummaryStore, cache: TokenCache | None = None) -> None:
        self.run, self.store, self.model, self.cache = run, store, run.sequence_model, cache
        self._popularity = run.read_popularity()
        with torch.no_grad():
            self._empty = self.model.empty_summary(1)[0].clone()
            self._empty_readout = self.model.state_readout(self.model.init_state(1))
        self._shape = tuple(self._empty.shape)

    @torch.no_grad()
    def read(self, users: Sequence[Any]) -> UserSummaries:
        """Tokens and recent events of users by original id. Raises StoreError for a damaged or misfit record."""
        found = self._find([user_key(user) for user in users], users)
        recent = Recent.empty(len(users), self.run.config.model.recent_events)
        sketch = self.model.init_sketch(len(users))
        tokens, readout = self._empty.expand(len(users), *self._shape).clone(), self._cold_readout(len(users))
        num_events, as_of_us = [0] * len(users), [-1] * len(users)
        for row, (stored, own) in found.items():
            tokens.numpy()[row] = own
            if self.model.sketch is not None:
                fill_sketch(self.model.sketch, sketch, row, stored)
            if readout is not None:
                fill_readout(readout, row, stored)
            fill_recent(recent, row, stored)
            num_events[row], as_of_us[row] = stored.num_events, stored.as_of_us
        return UserSummaries(
            tokens,
            sketch,
            recent,
            torch.tensor(num_events, dtype=torch.int64),
            torch.tensor(as_of_us, dtype=torch.int64),
            np.array([row in found for row in range(len(users))], bool),
            readout,
        )

    def cold(self, num_users: int) -> UserSummaries:
        """What ``read`` gives for users the store does not know."""
        return UserSummaries(
            self._empty.expand(num_users, *self._shape),
            self.model.init_sketch(num_users),
            Recent.empty(num_users, self.run.config.model.recent_events),
            torch.zeros(num_users, dtype=torch.int64),
            torch.full((num_users,), -1),
            np.zeros(num_users, bool),
            self._cold_readout(num_users),
        )

    def _cold_readout(self, num_users: int) -> torch.Tensor | None:
        """What candidates ask of users without events; a copy, to be filled."""
        empty = self._empty_readout
        return None if empty is None else empty.expand(num_users, *empty.shape[1:]).clone()

    def stored(self, user: Any) -> Stored | None:
        """The tokens record of one user, None where there is none. Raises StoreError as ``read``."""
        (blob,) = self.store.get_many("tokens", [user_key(user)], self.run.version)
        return None if blob is None else self._unpack(user, blob)

    def state(self, user: Any) -> Record | None:
        """The state record of one user, None where there is none. Raises StoreError for a damaged one."""
        (blob,) = self.store.get_many("state", [user_key(user)], self.run.version)
        try:
            return None if blob is None else decode(blob, self.run.version)
        except RecordError as error:
            raise RecordError(f"user {user!r}: {error}") from error

    def _find(self, keys: list[bytes], users: Sequence[Any]) -> dict[int, Decoded]:
        """The users that are known, by row: what the cache has, and from the store what it has not."""
        if self.cache is None:
            return self._fetch(keys, users, range(len(keys)))
        with self.cache.reading() as cache:
            found = {row: known for row, key in enumerate(keys) if (known := cache.get(key)) is not None}
            fetched = self._fetch(keys, users, [row for row in range(len(keys)) if row not in found])
            for row, decoded in fetched.items():
                cache.put(keys[row], decoded)
        return found | fetched

    def _fetch(self, keys: list[bytes], users: Sequence[Any], rows: Sequence[int]) -> dict[int, Decoded]:
        """Some of the users from the store, all records of a codec decoded at once."""
        blobs = self.store.get_many("tokens", [keys[row] for row in rows], self.run.version)
        stored = {
            row: self._unpack(users[row], blob) for row, blob in zip(rows, blobs, strict=True) if blob is not None
        }
        decoded: dict[int, Decoded] = {}
        for codec in sorted({one.codec for one in stored.values()}):
            mine = [row for row, one in stored.items() if one.codec == codec]
            tokens = decode_tokens([stored[row] for row in mine])
            decoded |= {row: (stored[row], own) for row, own in zip(mine, tokens, strict=True)}
        return decoded

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
    def score(self, summaries: UserSummaries, asked: Sequence[Asked]) -> list[np.ndarray]:
        """Probabilities (C, T) of each user's candidates.

        Keys and values of tokens and recent events are computed once per user. Candidates are cut into rows of equal
        width, as many per user as needed, so that users with few candidates do not pay for one with many.
        """
        rows = CandidateRows.of(asked, len(self.run.schema.context))
        users = self.model.prepare_users(summaries.tokens, summaries.recent, summaries.sketch, summaries.readout)
        at_us = torch.tensor([one.at_us for one in asked], dtype=torch.int64)
        step = max(CANDIDATES_AT_ONCE // rows.width, 1)
        parts = []
        for first in range(0, len(rows.user), step):
            some = slice(first, first + step)
            counts = None if self._popularity is None else self._popularity[rows.candidate[some]]
            requests = self.model.requests_of(
                summaries.recent, summaries.num_events, at_us,
                rows.user[some], rows.candidate[some], rows.context[some], counts,
            )  # fmt: skip
            logits = self.model.rank(users, requests)
            parts.append(logits.double().sigmoid().numpy())
        return rows.unpack(parts, len(self.run.schema.tasks))

    def request_of(self, summaries: UserSummaries, asked: Asked) -> Requests:
        """What one user's candidates ask of the model, as one row."""
        rows = CandidateRows.of([asked], len(self.run.schema.context), len(asked.index))
        counts = None if self._popularity is None else self._popularity[rows.candidate]
        at_us = torch.tensor([asked.at_us], dtype=torch.int64)
        return self.model.requests_of(
            summaries.recent, summaries.num_events, at_us, rows.user, rows.candidate, rows.context, counts
        )

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
        at_us = time.time_ns() // 1000 if at_us is None else at_us
        contexts = [None] * len(users) if context is None else context
        index = [self.run.catalogue.encode(list(own)) for own in candidates]
        asked = [Asked(own, at_us, one) for own, one in zip(index, contexts, strict=True)]
        summaries = self.read(users)
        return self.rankings(summaries, asked, self.score(summaries, asked))

    def rankings(
        self, summaries: UserSummaries, asked: Sequence[Asked], probabilities: Sequence[np.ndarray]
    ) -> list[Ranking]:
        """What was found out about each user, together."""
        return [
            Ranking(
                probability,
                one.index >= self.run.catalogue.first_item,
                bool(summaries.is_known[row]),
                int(summaries.num_events[row]),
                int(summaries.as_of_us[row]),
            )
            for row, (one, probability) in enumerate(zip(asked, probabilities, strict=True))
        ]


@dataclass(frozen=True)
class CandidateRows:
    """Candidates of several users as one rectangle: user (Q,), candidate (Q, C) item index, 0 pads, context (Q, C, X).

    lengths: candidates of each user; its rows stand one behind the other.
    """

    width: int
    user: torch.Tensor
    candidate: torch.Tensor
    context: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(cls, asked: Sequence[Asked], num_context: int, width: int = 0) -> CandidateRows:
        """width: of a row, in candidates; 0 for the best one."""
        lengths = [len(one.index) for one in asked]
        width = width or row_width(lengths)
        num_rows = [-(-length // width) for length in lengths]
        total = sum(num_rows)
        candidate = np.zeros(total * width, np.int64)
        context = np.full((total * width, num_context), np.nan, np.float32)
        place = 0
        for one, rows in zip(asked, num_rows, strict=True):
            candidate[place : place + len(one.index)] = one.index
            if one.context is not None:
                context[place : place + len(one.index)] = one.context
            place += rows * width
        return cls(
            width,
            torch.from_numpy(np.repeat(np.arange(len(asked)), num_rows)),
            torch.from_numpy(candidate).view(total, width),
            torch.from_numpy(context).view(total, width, num_context),
            lengths,
        )

    def unpack(self, parts: list[np.ndarray], num_tasks: int) -> list[np.ndarray]:
        """Probabilities of the rows, in parts (Q, C, T), to those of each user, (C, T)."""
        flat = np.concatenate([np.zeros((0, num_tasks)), *(part.reshape(-1, num_tasks) for part in parts)])
        taken = [-(-length // self.width) * self.width for length in self.lengths]
        starts = np.cumsum([0, *taken])[:-1].tolist()
        return [flat[start : start + length] for start, length in zip(starts, self.lengths, strict=True)]


def row_width(lengths: Sequence[int]) -> int:
    """How wide rows of candidates are: what makes padding and the rows' own cost the least together."""
    longest = max([*lengths, 1])
    widths = {min(width, longest) for width in ROW_WIDTHS}
    return min(widths, key=lambda width: sum(-(-length // width) for length in lengths) * (width + ROW_COST))
