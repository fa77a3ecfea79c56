"""What can be known of one user's history, and which of its events wrote which summary token.

The store holds the newest events raw; the rest of a history is in the memory, as sums. Where the server was given
prepared data, older events come from there. What neither has is counted and said, not guessed.

Shape letters: N events, K summary tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.errors import DataError
from vista.models.inputs import NO_GAP_US, Events
from vista.models.tracing import token_shares, why_no_shares
from vista.records import from_records
from vista.schema import Manifest
from vista.serving.deployment import Model
from vista.serving.lanes import too_late
from vista.store.record import Record, Stored

MAX_TRACED = 100_000  # events; with 256 tokens their shares take 100 MB
COLUMNS = ("item", "action", "timestamp_us", "gap_us")
Logged = tuple[np.ndarray, np.ndarray, np.ndarray]  # item index, action, timestamp_us, (N,) each, oldest first


class HistorySource(Protocol):
    """Where whole histories are: prepared data (``vista.data.histories.PreparedData``), which no server needs."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def catalogue(self) -> Catalogue: ...

    def history_of(self, user_id: object) -> Logged | None:
        """One user's events, None for a user without any. Raises DataError where the data has changed."""


@dataclass(frozen=True)
class Timeline:
    """The events known of one user, oldest first: item, action, timestamp_us, gap_us, place (N,) int64 each.

    place: counted from 0 over the whole history of num_events; note: why older events are not there, or empty.
    """

    item: np.ndarray
    action: np.ndarray
    timestamp_us: np.ndarray
    gap_us: np.ndarray
    place: np.ndarray
    num_events: int
    note: str

    @property
    def num_missing(self) -> int:
        return self.num_events - len(self.place)


def timeline(model: Model, record: Record | Stored, source: HistorySource | None, user: object) -> Timeline:
    """Events that a record holds raw, and before them those of prepared data."""
    held = {name: record.arrays[f"recent_{name}"].astype(np.int64) for name in COLUMNS}
    first_held = record.num_events - len(held["item"])
    older, note = _logged(model, source, user)
    number = min(first_held, len(older["item"]))
    if len(held["item"]):
        number = min(number, int(np.searchsorted(older["timestamp_us"], held["timestamp_us"][0], "right")))
    columns = {name: np.concatenate([older[name][:number], held[name]]) for name in COLUMNS}
    place = np.concatenate([np.arange(number), np.arange(first_held, record.num_events)])
    if number < first_held and not note:
        note = "The prepared data has fewer events of this user than the store was made from."
    return Timeline(**columns, place=place, num_events=record.num_events, note=note if number < first_held else "")


def _logged(model: Model, source: HistorySource | None, user: object) -> tuple[dict[str, np.ndarray], str]:
    """A user's events in prepared data, as columns, and why there are none."""
    found: Logged | None = None
    if source is None:
        note = "The store keeps the newest events; older ones are shown by a server that was started with --data."
    elif (source.catalogue.fingerprint, source.manifest.actions) != (
        model.run.schema.catalogue_fingerprint, model.run.schema.actions,
    ):  # fmt: skip
        note = "The prepared data is of another catalogue than the model that answers; older events are not shown."
    else:
        note = ""
        try:
            found = source.history_of(user)
        except DataError as error:
            note = f"Older events cannot be read: {error}"
    item, action, at_us = (np.zeros(0, np.int64),) * 3 if found is None else (c.astype(np.int64) for c in found)
    gap_us = np.diff(at_us, prepend=at_us[:1] - NO_GAP_US)
    return dict(zip(COLUMNS, (item, action, at_us, gap_us), strict=True)), note


@dataclass(frozen=True)
class Traced:
    """Shares (K, N) of a timeline's closed events in each token; why_not: the reason where there are none.

    num_closed: events that the tokens were read from; the others are in the open segment, or were left out.
    """

    model: Model
    timeline: Timeline
    num_closed: int
    place: np.ndarray
    shares: np.ndarray
    why_not: str


def trace(model: Model, record: Record, known: Timeline, deadline_s: float) -> Traced:
    """Who wrote a user's tokens. record: the state. Raises RequestError when the deadline passes on the way."""
    summarizer = model.scorer.model.summarizer
    num_closed = known.num_events - known.num_events % model.run.config.model.segment_events
    why_not = why_no_shares(summarizer) or _why_not(model, known, num_closed)
    end = int((known.place < num_closed).sum())
    chosen = slice(end if why_not else max(end - MAX_TRACED, 0), end)
    place = known.place[chosen]
    blocks = [np.zeros((0 if summarizer is None else summarizer.config.num_seeds, 0), np.float32)]
    if len(place):
        assert summarizer is not None
        columns = {name: torch.from_numpy(getattr(known, name)[chosen].copy()) for name in COLUMNS}
        events = Events(**columns, offsets=torch.tensor([0, len(place)]))
        for shares in token_shares(summarizer, from_records(model.scorer.model, [record]), events):
            if time.monotonic() > deadline_s:
                raise too_late()
            blocks.append(shares.numpy())
    return Traced(model, known, num_closed, place, np.concatenate(blocks, 1), why_not)


def _why_not(model: Model, known: Timeline, num_closed: int) -> str:
    """Why the shares of this user's events cannot be told, or empty."""
    config = model.run.config.model
    if not num_closed:
        return f"No segment of {config.segment_events} events is closed yet; the tokens are those of an empty history."
    if config.num_layers > 1 and (known.num_missing or num_closed > MAX_TRACED):
        what = "not all known" if known.num_missing else f"more than {MAX_TRACED:,}"
        return (
            f"The model has {config.num_layers} summarizer layers, so that a share depends on all earlier events, and "
            f"these are {what}."
        )
    return ""
