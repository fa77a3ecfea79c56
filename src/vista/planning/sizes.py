"""Bytes of one user, from the code that writes them: a user is streamed into memory, and the records are weighed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.checkpoint import ModelSchema, Run, build_model
from vista.config import Config
from vista.errors import ConfigError
from vista.jobs.deliver import Delivery, blocks, work_out
from vista.store.memory_store import MemoryStore
from vista.store.record import user_key
from vista.updates.apply import NewEvents, UpdateOptions, check_model

VERSION = "0123456789abcdef"  # of a fresh model; as long as any
NUM_ITEMS, FIRST_ITEM = 20_000, 65
USER_ID = 1_234_567_890  # ten digits, as with some 10^9 users
START_US, GAP_US = 1_500_000_000_000_000, 60_000_000
LONGEST_READ = 20_000  # events read of a history: a state does not grow, and a sketch has met its items by then
HISTORY_BYTES = 4 + 2 + 8  # per event of prepared data: item, action, time (vista/schema.py)
PAGE_BYTES, PAGE_HEADER, LEAF_BYTES = 4_096, 16, 82  # of LMDB: whole pages for a record, and its entry in the tree
STRING_BYTES, ENTRY_BYTES = 10, 48  # of a Redis server: inside a size class of its allocator, and beside it


@dataclass(frozen=True)
class UserBytes:
    """tokens, state: of the two records of a user; event: of an entry of the event log."""

    tokens: int
    state: int
    event: int

    @property
    def both(self) -> int:
        return self.tokens + self.state


def fresh_run(config: Config) -> Run:
    """A run with a model that was never trained: its records and its work are those of a trained one."""
    rows = np.arange(FIRST_ITEM + NUM_ITEMS, dtype=np.int32)
    items = Catalogue(np.arange(NUM_ITEMS), rows)
    schema = ModelSchema(("click",), ("view",), (), items.fingerprint, ())
    torch.manual_seed(0)
    model = build_model(config.model, schema, items).eval()
    return Run(Path(f"a fresh model of width {config.model.width}"), config, schema, items, model, VERSION)


def log_entries(run: Run, user_ids: list[Any], first: int, num: int) -> list[dict[str, Any]]:
    """``num`` further events of each user, behind ``first`` ones, as an event log has them: items at random."""
    rng = np.random.default_rng(first)
    items = run.catalogue.ids[rng.integers(0, run.catalogue.num_items, (num, len(user_ids)))].tolist()
    action = run.schema.actions[0] if run.schema.actions else None
    return [
        {"user_id": user, "item_id": item, "timestamp_us": START_US + n * GAP_US, "action": action,
         "event_id": n * len(user_ids) + place}
        for n, row in enumerate(items, first)
        for place, (user, item) in enumerate(zip(user_ids, row, strict=True))
    ]  # fmt: skip


def user_bytes(run: Run, history: int, codec: str) -> UserBytes:
    """What is stored of a user with so many events, with event ids and a mark. Raises for a model without states."""
    check_model(run)
    entries = log_entries(run, [USER_ID], 0, min(history, LONGEST_READ))
    names = ("user_id", "item_id", "action", "event_id")
    user, item, action, event_id = ([entry[name] for entry in entries] for name in names)
    times = np.array([entry["timestamp_us"] for entry in entries])
    place = np.arange(len(entries))
    delivery = Delivery(NewEvents(user, item, times, action, event_id), "log", 0 * place, place, times)
    with MemoryStore(f"{__name__}, {id(run)}") as store:
        (block,) = blocks(run, delivery)
        work = work_out(run, store, block, UpdateOptions(codec=codec), np.ones(1, bool))
    found = {kind: len(blob) for kind, key, blob in work.writes if key == user_key(USER_ID)}
    event = len(json.dumps({**entries[-1], "arrived_us": START_US})) + 1  # and its line break
    return UserBytes(found["tokens"], found["state"], event)


def kept_bytes(engine: str, record_bytes: int) -> int:
    """What an engine keeps for a record (docs/store.md): LMDB on disk, Redis in memory. Raises ConfigError."""
    if engine == "lmdb":
        return -(-(record_bytes + PAGE_HEADER) // PAGE_BYTES) * PAGE_BYTES + LEAF_BYTES
    if engine == "redis":
        string = record_bytes + STRING_BYTES
        step = 1 << max((string - 1).bit_length() - 3, 0)  # four classes to a doubling
        return -(-string // step) * step + ENTRY_BYTES
    raise ConfigError(f"--engine {engine!r}: lmdb or redis")
