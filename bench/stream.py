"""What exactly-once costs: events a second through `vista stream`, over those of one call of `apply_events`.

    python bench/stream.py --users 200 --events 10000 --repeats 3

Prints, per size of micro-batch, the median ratio of the rates (least to most) and the freshness of tokens from arrival,
measured with a log that is fed at half of the rate found. A fresh model of size small, an LMDB store, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from vista.catalogue import Catalogue
from vista.checkpoint import ModelSchema, Run
from vista.config import resolve
from vista.jobs.sources.contract import open_source
from vista.jobs.sources.directory import DirectoryLog
from vista.jobs.stream import Stream, StreamOptions
from vista.models.embeddings import ItemTables
from vista.models.vista import make_model
from vista.store.contract import open_store
from vista.updates.apply import NewEvents, apply_events

START_US = 1_700_000_000_000_000
NUM_ITEMS = 1000
SIZES = (100, 1000, 10_000)


def small_run() -> Run:
    """A fresh model: what a step costs does not depend on training."""
    config = resolve("small")
    rows = np.arange(NUM_ITEMS + 2, dtype=np.int32)
    items = Catalogue(np.arange(NUM_ITEMS), rows, 1, np.zeros((len(rows), 0), np.int32), (), ())
    torch.manual_seed(0)
    model = make_model(config.model, ItemTables.of(items), 1, 1, (), 0).eval()
    schema = ModelSchema(("click",), ("a",), (), items.fingerprint, ())
    return Run(Path(), config, schema, items, model, "0123456789abcdef")


def random_log(num_users: int, num_events: int) -> list[dict]:
    rng = np.random.default_rng(0)
    times = (START_US + np.cumsum(rng.integers(1, 1_000_000, num_events))).tolist()
    users, items = rng.integers(0, num_users, num_events).tolist(), rng.integers(0, NUM_ITEMS, num_events).tolist()
    rows = zip(users, items, times, strict=True)
    return [{"user_id": u, "item_id": i, "timestamp_us": t, "event_id": t, "action": "a"} for u, i, t in rows]


def seconds_at_once(run: Run, events: list[dict], folder: Path) -> float:
    columns = ([event[name] for event in events] for name in ("user_id", "item_id"))
    times = np.array([event["timestamp_us"] for event in events])
    new = NewEvents(*columns, times, ["a"] * len(events), times.tolist())
    with open_store(str(folder)) as store:
        store.begin_version(run.version, 1, 1, 0)
        start_s = time.perf_counter()
        apply_events(run, store, new)
        return time.perf_counter() - start_s


def stream(run: Run, log: Path, folder: Path, size: int, feed: threading.Thread | None = None) -> tuple[Stream, float]:
    options = StreamOptions(folder / "dead", max_events=size, begin=True, until_end=feed is None, quiet=True)
    with open_source(f"dir:{log}") as source, open_store(str(folder / "store")) as store:
        made = Stream(run, store, source, options)
        if feed is not None:
            feed.start()
            threading.Thread(target=lambda: (feed.join(), made.stop.set())).start()
        start_s = time.perf_counter()
        made.go()
        return made, time.perf_counter() - start_s


def fresh_s(run: Run, events: list[dict], folder: Path, size: int, rate: float) -> float:
    """Mean seconds from arrival to tokens, of a log that gets so many events a second."""
    log = DirectoryLog(folder / "fed")

    def feed() -> None:
        step = max(int(rate / 20), 1)
        for first in range(0, min(len(events), int(5 * rate)), step):
            log.append(events[first : first + step])
            time.sleep(step / rate)

    made, _ = stream(run, folder / "fed", folder / "fresh", size, threading.Thread(target=feed))
    histogram = made.metrics.from_arrival
    return histogram.sum_s / sum(histogram.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("users", 200), ("events", 10_000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run, events = small_run(), random_log(chosen.users, chosen.events)
    print("| micro-batch | rate over one batch | freshness |\n|---|---|---|")
    for size in SIZES:
        ratios = []
        for _ in range(chosen.repeats):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                DirectoryLog(folder / "log").append(events)
                at_once_s = seconds_at_once(run, events, folder / "batch")
                _, stream_s = stream(run, folder / "log", folder, size)
                ratios.append(at_once_s / stream_s)
        with tempfile.TemporaryDirectory() as name:
            seconds = fresh_s(run, events, Path(name), size, 0.5 * len(events) / stream_s)
        print(
            f"| {size} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {seconds:.2f} s |"
        )


if __name__ == "__main__":
    main()
