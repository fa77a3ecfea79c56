"""A fresh model, users with one made history of different lengths, and rankings to ask for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.checkpoint import ModelSchema, Run, load_run, start_run, write_tensors
from vista.config import Config, resolve
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events
from vista.models.vista import make_model
from vista.records import to_records
from vista.store.contract import open_store
from vista.store.record import encode

NUM_ITEMS = 20_000
START_US, NOW_US = 1_500_000_000_000_000, 1_700_000_000_000_000
FOLDED_AT_ONCE = 100_000  # events
BODIES = 16  # different requests of each kind
Cell = tuple[int, int]  # events of the history, candidates


def config_of(chosen: argparse.Namespace, **overrides: Any) -> Config:
    named = {f"model.{name}": value for name, value in overrides.items()}
    return resolve(chosen.size, overrides=named | dict(pair.split("=", 1) for pair in chosen.set))


def catalogue() -> Catalogue:
    return Catalogue(np.arange(NUM_ITEMS), np.arange(NUM_ITEMS + 2, dtype=np.int32), 1)


def small_run(folder: Path, chosen: argparse.Namespace) -> Run:
    """A run folder of a fresh model, loaded."""
    config, items = config_of(chosen, popularity_hours=0), catalogue()
    torch.manual_seed(0)
    model = make_model(config.model, ItemTables.of(items), 1, 1, (), 0)
    start_run(folder, config, ModelSchema(("click",), ("a",), (), items.fingerprint), items)
    write_tensors(folder / "model.safetensors", model.state_dict())
    return load_run(folder)


def history(num_events: int) -> Events:
    """One user's: long-tailed items, a few minutes between two events."""
    rng = np.random.default_rng(0)
    item = torch.from_numpy(rng.zipf(1.2, num_events) % NUM_ITEMS + 2)
    at_us = torch.from_numpy(START_US + np.cumsum(rng.integers(1, 180_000_000, num_events)))
    return Events.from_log(item, torch.ones_like(item), at_us, torch.tensor([0, num_events]))


def user_of(length: int, number: int) -> str:
    return f"{length}-{number}"


@torch.no_grad()
def fill(run: Run, url: str, lengths: Sequence[int], users: int) -> None:
    """A store with so many users of every length, published."""
    model, whole = run.sequence_model, history(max(lengths))
    state, done = model.init_state(1), 0
    tokens, width = model.empty_summary(1).shape[1:]
    with open_store(url) as store:
        store.begin_version(run.version, tokens, width, len(lengths) * users)
        for length in sorted(lengths):
            while done < length:
                end = min(done + FOLDED_AT_ONCE, length)
                columns = (c[done:end] for c in (whole.item, whole.action, whole.timestamp_us))
                state, done = model.extend(state, Events.from_log(*columns, torch.tensor([0, end - done]))), end
            for number in range(users):
                records = to_records(model, state, [user_of(length, number)], run.version)
                store.commit([(r.kind, r.user_key, encode(r, "int8")) for r in records], run.version)
        store.complete_version(run.version)
        store.publish(run.version)


def bodies(cell: Cell, users: int) -> list[bytes]:
    """Requests for a cell: the candidates are the same for every length."""
    length, candidates = cell
    rng = np.random.default_rng(candidates)
    asks = [
        {
            "user": user_of(length, number % users),
            "candidates": rng.choice(NUM_ITEMS, candidates, replace=False).tolist(),
            "at": NOW_US,
        }
        for number in range(BODIES)
    ]
    return [json.dumps(ask).encode() for ask in asks]
