"""A real server in this process: HTTP and gRPC on free ports, around runs with random weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.serving.test_scorer import USERS, make_run, records
from vista.checkpoint import Run, load_run, start_run, write_popularity, write_tensors
from vista.schema import ContextColumn
from vista.serving.metrics import Metrics
from vista.serving.options import ServeOptions
from vista.serving.server import Server, bound
from vista.serving.service import Service
from vista.store.contract import SummaryStore
from vista.store.record import encode

CONTEXT = (ContextColumn("price", "number", 10.0, 2.0), ContextColumn("device", "category"))


@dataclass(frozen=True)
class Running:
    """A server, its service and its ports."""

    service: Service
    http_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


def saved_run(folder: Path, seed: int = 0, **changes: object) -> Run:
    """A run folder with random weights, and a random table of popularity where the model reads one, loaded."""
    made = make_run(CONTEXT, seed=seed, **changes)
    start_run(folder, made.config, made.schema, made.catalogue)
    write_tensors(folder / "model.safetensors", made.model.state_dict())
    if made.config.model.has_popularity:
        shape = made.catalogue.num_indices, len(made.schema.count_features)
        write_popularity(folder, np.random.default_rng(seed).normal(size=shape).astype(np.float32), 0)
    return load_run(folder)


def fill(store: SummaryStore, run: Run) -> None:
    """Summaries of USERS, published."""
    store.begin_version(run.version, 4, 12, len(USERS))
    store.commit([(r.kind, r.user_key, encode(r, "float32")) for r in records(run)], run.version)
    store.complete_version(run.version)
    store.publish(run.version)


@contextmanager
def running(options: ServeOptions, store: SummaryStore, token: bytes | None = None) -> Iterator[Running]:
    """A server in a thread of its own; drained at the end."""
    options = replace(options, http_port=0, grpc_port=0)
    service = Service(options, store, Metrics())
    started = threading.Event()
    found: dict[str, Any] = {}

    def on_start(grpc_port: int) -> None:
        found["port"] = grpc_port
        started.set()

    with bound(options) as listening:

        async def run() -> None:
            found["server"], found["loop"] = Server(options, service, token), asyncio.get_running_loop()
            await found["server"].run(listening, started=on_start)

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        assert started.wait(20)
        try:
            yield Running(service, listening.getsockname()[1], found["port"])
        finally:
            found["loop"].call_soon_threadsafe(found["server"].stop)
            thread.join(20)
            service.close()
            assert not thread.is_alive()
