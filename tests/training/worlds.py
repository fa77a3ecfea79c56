"""A small prepared data folder in which a liked category decides the click, written without ``vista prepare``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from tests.models.worlds import catalogue
from vista.data.histories import PreparedData
from vista.schema import Manifest

EVENTS_PER_USER, REQUESTS_PER_USER, CANDIDATES = 60, 12, 4
SMALL = {
    "model.width": 16, "model.num_heads": 2, "model.segment_events": 8, "model.recent_events": 16, "model.num_seeds": 4,
    "model.ranker_layers": 1, "model.head_width": 8, "train.requests_per_step": 24, "train.window_segments": 3,
    "train.reconstruction_events": 8, "train.validate_every_steps": 5, "train.warmup_steps": 2,
}  # fmt: skip


def write_world(folder: Path, num_users: int = 30, seed: int = 0, label: int | None = None) -> PreparedData:
    """label: give every impression this one instead."""
    rng = np.random.default_rng(seed)
    items = catalogue()
    first = items.first_item
    num_events = num_users * EVENTS_PER_USER
    item = rng.integers(first, items.num_indices, num_events).astype(np.int32)
    gaps = rng.integers(1, 10**10, (num_users, EVENTS_PER_USER))
    times = (10**15 + np.cumsum(gaps, 1)).astype(np.int64)
    _save(folder / "events", {
        "offsets": np.arange(num_users + 1) * EVENTS_PER_USER, "item": item,
        "action": rng.integers(1, 4, num_events).astype(np.int16), "timestamp_us": times.ravel(),
    })  # fmt: skip
    known = np.sort(rng.choice(EVENTS_PER_USER, (num_users, REQUESTS_PER_USER)), 1)
    liked = items.features[item].reshape(num_users, EVENTS_PER_USER)[:, 0]
    for split, columns in {"train": slice(0, 8), "validation": slice(8, 10), "test": slice(10, 12)}.items():
        mine = known[:, columns]
        candidates = rng.integers(first, items.num_indices, (mine.size, CANDIDATES)).astype(np.int32)
        clicked = items.features[candidates][..., 0] == np.repeat(liked, mine.shape[1])[:, None]
        clicked = clicked if label is None else np.full_like(clicked, label)
        before = np.maximum(mine - 1, 0)
        _save(folder / "impressions" / split, {
            "user": np.repeat(np.arange(num_users), mine.shape[1]).astype(np.int32), "num_known": mine.ravel(),
            "timestamp_us": np.take_along_axis(times, before, 1).ravel() + 1,
            "offsets": np.arange(mine.size + 1) * CANDIDATES, "item": candidates.ravel(),
            "label": clicked.reshape(-1, 1).astype(np.int8), "source": np.zeros(candidates.size, np.int8),
            "context": np.zeros((candidates.size, 0), np.float32),
        })  # fmt: skip
    items.save(folder / "catalogue.safetensors")
    pl.DataFrame({"user_id": np.arange(num_users) + 100}).write_parquet(folder / "users.parquet")
    Manifest(tasks=("click",), actions=("view", "like", "share")).save(folder)
    return PreparedData.open(folder)


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
