"""Cost of training per impression, against the length of the history.

    python bench/train_scaling.py [--lengths 1000 10000 100000] [--repeats 3] [--out FOLDER]

Two ways to train the same model on the same requests, in one run and in turn:

- timeline: as `vista train` does it. A lane walks along the history, one pass serves every impression on it.
- per impression: as most public code does it. Each impression reads its own history from the beginning.

Every history has a request each EVENTS_PER_REQUEST events, whatever its length, and every way makes full training steps
(forward, backward, both optimizers). Prints milliseconds per impression, and the ratios that matter: of a length to the
shortest (timeline should stay near 1), and of one way to the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vista.batches.builder import BatchBuilder, Step
from vista.batches.plans import Feed, Stretch
from vista.batches.timelines import TimelineWalk
from vista.catalogue import Catalogue
from vista.config import Config, resolve
from vista.data.histories import Histories, Impressions
from vista.models.embeddings import ItemTables
from vista.models.vista import make_model
from vista.training.loop import Feeds, Trainer

EVENTS_PER_REQUEST, CANDIDATES, NUM_ITEMS = 8, 8, 10_000
TIMELINE_EVENTS = 200_000  # events of all histories together ...
LEAST_USERS = 8  # ... but no fewer histories than fill a training step (128 segments, at most 16 of one history)
REQUESTS_TIMED = 6  # of the per-impression way, at random places; it is slow at length


def make_feed(length: int, config: Config, seed: int = 0) -> tuple[Feed, Catalogue]:
    """Users with histories of ``length`` events each."""
    rng = np.random.default_rng(seed)
    users = max(LEAST_USERS, TIMELINE_EVENTS // length)
    catalogue = Catalogue(np.arange(NUM_ITEMS), np.arange(65 + NUM_ITEMS, dtype=np.int32))
    item = (rng.zipf(1.2, users * length) % NUM_ITEMS + catalogue.first_item).astype(np.int32)
    times = (10**15 + np.cumsum(rng.integers(1, 10**9, (users, length)), 1)).astype(np.int64)
    log = Histories(np.arange(users + 1) * length, item, np.ones(len(item), np.int16), times.ravel())
    known = np.arange(EVENTS_PER_REQUEST, length + 1, EVENTS_PER_REQUEST)
    num = users * len(known)
    impressions = Impressions(
        user=np.repeat(np.arange(users), len(known)).astype(np.int32),
        timestamp_us=(times[:, known - 1] + 1).ravel(),
        num_known=np.tile(known, users),
        offsets=np.arange(num + 1) * CANDIDATES,
        item=rng.integers(catalogue.first_item, catalogue.num_indices, num * CANDIDATES).astype(np.int32),
        label=rng.integers(0, 2, (num * CANDIDATES, 1)).astype(np.int8),
        source=np.zeros(num * CANDIDATES, np.int8),
        context=np.zeros((num * CANDIDATES, 0), np.float32),
    )
    return Feed(log, impressions, config, train=True), catalogue


def make_trainer(feed: Feed, catalogue: Catalogue, config: Config, folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = make_model(config.model, ItemTables.of(catalogue), 1, 1, (), 0)
    return Trainer(model, Feeds(feed, feed), config, folder)


def time_timeline(trainer: Trainer, seed: int) -> float:
    """Milliseconds per impression over one epoch, batches included."""
    started, shown = time.perf_counter(), 0
    for step in TimelineWalk(trainer.feeds.train, seed):
        trainer.train_step(step)
        shown += int(step.batch.is_valid.sum())
    return 1000 * (time.perf_counter() - started) / shown


def time_per_impression(trainer: Trainer, seed: int) -> float:
    """Milliseconds per impression when every request reads its whole history."""
    feed, size = trainer.feeds.train, trainer.config.model.segment_events
    rng = np.random.default_rng(seed)
    requests = rng.integers(0, feed.impressions.num_requests, REQUESTS_TIMED)
    shown, started = 0, time.perf_counter()
    for request in requests.tolist():
        user, last = int(feed.impressions.user[request]), int(feed.impressions.num_known[request]) // size
        batch = BatchBuilder(feed, rng).build([Stretch(user, 0, last, request, request + 1)])
        trainer.train_step(Step(batch, [user], [False], [False]))
        shown += int(batch.is_valid.sum())
    return 1000 * (time.perf_counter() - started) / shown


def measure(lengths: list[int], repeats: int, config: Config) -> list[dict[str, float]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {n: make_trainer(*make_feed(n, config), config, Path(folder)) for n in lengths}
        times: dict[tuple[int, str], list[float]] = {}
        for repeat in range(repeats + 1):  # the first is a warm-up
            for n, trainer in trainers.items():
                for name, timed in (("timeline", time_timeline), ("per impression", time_per_impression)):
                    times.setdefault((n, name), []).append(timed(trainer, repeat))
                    print(f"{n:>9,} events  {name:<15} {times[n, name][-1]:9.3f} ms per impression", flush=True)
    for n in lengths:
        timeline, single = (times[n, name][1:] for name in ("timeline", "per impression"))
        rows.append(
            {
                "events": n,
                "timeline_ms": statistics.median(timeline),
                "per_impression_ms": statistics.median(single),
                "timeline_to_shortest": statistics.median(
                    a / b for a, b in zip(timeline, times[lengths[0], "timeline"][1:], strict=True)
                ),
                "per_impression_to_timeline": statistics.median(b / a for a, b in zip(timeline, single, strict=True)),
            }
        )
    return rows


def plot(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    events = [row["events"] for row in rows]
    axes.loglog(events, [row["per_impression_ms"] for row in rows], "s--", label="one reading per impression")
    axes.loglog(events, [row["timeline_ms"] for row in rows], "o-", label="one reading per timeline (vista train)")
    axes.set(xlabel="events in the history", ylabel="training, ms per impression")
    axes.set_title("Cost of training and history length")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for train_scaling.json and train_scaling.png")
    arguments = parser.parse_args()
    rows = measure(sorted(arguments.lengths), arguments.repeats, resolve("tiny"))
    machine = platform.processor() or platform.machine()
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'events':>9} {'timeline ms':>12} {'to shortest':>12} {'per impression ms':>18} {'to timeline':>12}")
    for row in rows:
        print(
            f"{row['events']:>9,} {row['timeline_ms']:>12.3f} {row['timeline_to_shortest']:>12.2f} "
            f"{row['per_impression_ms']:>18.3f} {row['per_impression_to_timeline']:>12.1f}"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "train_scaling.json").write_text(json.dumps(rows, indent=2) + "\n")
        plot(rows, arguments.out / "train_scaling.png")


if __name__ == "__main__":
    main()
