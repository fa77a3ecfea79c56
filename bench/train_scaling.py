"""Training: what an impression costs, whether the model waits for data, memory of long windows, sparse gradients.

    python bench/train_scaling.py [--only throughput memory embeddings] [--lengths 100 1000 10000] [--repeats 3]
                                  [--sizes tiny small base] [--window 100000] [--items 1000000] [--out FOLDER]

throughput: two ways to train the same model on the same impressions, in one run and in turn.

- timeline: as `vista train` does it. A lane walks along the history, one pass serves every impression on it.
- per impression: as most public code does it (FuxiCTR, for one). Each impression is a row with a padded window of its
  own, that is encoded for it alone.

Every history has a request each EVENTS_PER_REQUEST events, whatever its length, and every way makes full training steps
(forward, backward, both optimizers). Costs are processor time, building batches included, so that ratios hold on a
busy machine; impressions and events per second are by the clock. `build`: share of the time that goes into building
batches where each is built when asked for; `waits`: share that the model waits where they are built ahead.

memory: most memory of a process that makes one step over a window of so many events through which gradients flow.
embeddings: a step with sparse gradients of a large item table, over one with dense gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.batches.builder import BatchBuilder
from vista.batches.plans import Feed, Plan, Stretch
from vista.batches.portions import Portion, SharedStep, Sharer, ahead
from vista.batches.timelines import TimelineWalk
from vista.catalogue import Catalogue
from vista.config import Config, resolve
from vista.data.histories import Histories, Impressions
from vista.models.embeddings import ItemTables
from vista.models.vista import make_model
from vista.training.loop import Feeds, Trainer

EVENTS_PER_REQUEST, CANDIDATES, NUM_ITEMS = 8, 8, 10_000
TIMELINE_EVENTS = 100_000  # events of all histories together ...
LEAST_USERS = 8  # ... but no fewer histories than fill a training step (128 segments, at most 16 of one history)
ROWS_AT_ONCE = 32_000  # events of a step of the per-impression way, ...
STEPS_TIMED = 3  # ... and steps of it that are timed, at random places; it is slow at length
WINDOW_REQUESTS = 500  # in the window whose memory is measured
EMBEDDING_STEPS = 6


def make_feed(length: int, config: Config, num_users: int, num_items: int = NUM_ITEMS, every: int = 0) -> Feed:
    """Users with histories of ``length`` events, and a request each ``every`` of them."""
    rng = np.random.default_rng(0)
    every, first = every or EVENTS_PER_REQUEST, catalogue_of(num_items).first_item
    item = (rng.zipf(1.2, num_users * length) % num_items + first).astype(np.int32)
    times = (10**15 + np.cumsum(rng.integers(1, 10**9, (num_users, length)), 1)).astype(np.int64)
    log = Histories(np.arange(num_users + 1) * length, item, np.ones(len(item), np.int16), times.ravel())
    known = np.arange(every, length + 1, every)
    num = num_users * len(known)
    impressions = Impressions(
        user=np.repeat(np.arange(num_users), len(known)).astype(np.int32),
        timestamp_us=(times[:, known - 1] + 1).ravel(),
        num_known=np.tile(known, num_users),
        offsets=np.arange(num + 1) * CANDIDATES,
        item=rng.integers(first, first + num_items, num * CANDIDATES).astype(np.int32),
        label=rng.integers(0, 2, (num * CANDIDATES, 1)).astype(np.int8),
        source=np.zeros(num * CANDIDATES, np.int8),
        context=np.zeros((num * CANDIDATES, 0), np.float32),
    )
    return Feed(log, impressions, config, train=True)


def catalogue_of(num_items: int) -> Catalogue:
    return Catalogue(np.arange(num_items), np.arange(65 + num_items, dtype=np.int32))


def make_trainer(feed: Feed, folder: Path, num_items: int = NUM_ITEMS, is_sparse: bool = True) -> Trainer:
    torch.manual_seed(0)
    model: Any = make_model(feed.config.model, ItemTables.of(catalogue_of(num_items)), 1, 1, (), 0)
    model.embedding.items.rows.sparse = is_sparse
    return Trainer(model, Feeds(feed, feed), feed.config, folder)


# -- throughput


def by_timeline(feed: Feed, seed: int) -> Iterator[SharedStep]:
    """As many steps as an epoch has, as `vista train` walks."""
    num_steps = -(-feed.impressions.num_requests // feed.config.train.requests_per_step)
    return islice(Sharer(feed).steps(TimelineWalk(feed, seed)), num_steps)


def by_impression(feed: Feed, seed: int) -> Iterator[SharedStep]:
    """Some steps of shuffled impressions, each with its own window: the whole history before it."""
    shown, size = feed.impressions, feed.config.model.segment_events
    request = np.repeat(np.arange(shown.num_requests), np.diff(shown.offsets))
    alone = Impressions(
        *(getattr(shown, name)[request] for name in ("user", "timestamp_us", "num_known")),
        np.arange(len(request) + 1), shown.item, shown.label, shown.source, shown.context,
    )  # fmt: skip
    builder, rng = BatchBuilder(replace(feed, impressions=alone)), np.random.default_rng(seed)
    length = int(shown.num_known.max())
    for _ in range(STEPS_TIMED):
        chosen = rng.integers(0, len(request), max(1, ROWS_AT_ONCE // length)).tolist()
        stretches = [Stretch(int(alone.user[i]), 0, int(alone.num_known[i]) // size, i, i + 1) for i in chosen]
        no, drawn = [False] * len(chosen), builder.draw(stretches, rng)
        yield SharedStep([Portion(builder.step(Plan(stretches, no, no, [0] * len(chosen), drawn)))])


def measure_steps(trainer: Trainer, steps: Iterator[SharedStep]) -> dict[str, float]:
    """What steps cost: impressions, events folded, processor seconds, seconds, and those of them spent waiting."""
    impressions = events = 0
    waited, started, cpu = 0.0, time.perf_counter(), time.process_time()
    while True:
        asked = time.perf_counter()
        step = next(steps, None)
        waited += time.perf_counter() - asked
        if step is None:
            break
        trainer.train_step(step)
        impressions += sum(int(p.step.batch.is_valid.sum()) for p in step.portions)
        events += sum(p.step.batch.segment.numel() for p in step.portions)
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {"impressions": impressions, "events": events, "cpu_s": cpu_s, "elapsed_s": elapsed_s, "waited_s": waited}


WAYS = {
    "timeline": by_timeline,
    "ahead": lambda feed, seed: ahead(by_timeline(feed, seed), 2),
    "per impression": by_impression,
}


def throughput(lengths: list[int], repeats: int, folder: Path) -> list[dict[str, float]]:
    config = resolve("tiny")
    trainers = {
        n: make_trainer(make_feed(n, config, max(LEAST_USERS, TIMELINE_EVENTS // n)), folder / str(n)) for n in lengths
    }
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for n, trainer in trainers.items():
            for way, steps in WAYS.items():
                found.setdefault((n, way), []).append(measure_steps(trainer, steps(trainer.feeds.train, repeat)))
    return [throughput_row(n, lengths[0], found) for n in lengths]


def throughput_row(n: int, shortest: int, found: dict[tuple[int, str], list[dict[str, float]]]) -> dict[str, float]:
    def each(length: int, way: str, over: str, under: str) -> list[float]:
        return [run[over] / run[under] for run in found[length, way][1:]]

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    cost, alone = (each(n, way, "cpu_s", "impressions") for way in ("timeline", "per impression"))
    row = {
        "events": n,
        "timeline_ms": 1000 * statistics.median(cost),
        "per_impression_ms": 1000 * statistics.median(alone),
    }
    row |= {"to_shortest": ratio(cost, each(shortest, "timeline", "cpu_s", "impressions"))}
    row["per_impression_to_timeline"] = ratio(alone, cost)
    for way in ("timeline", "per impression"):
        for what in ("impressions", "events"):
            row[f"{way}: {what}/s"] = statistics.median(each(n, way, what, "elapsed_s"))
    row["build"] = statistics.median(each(n, "timeline", "waited_s", "elapsed_s"))
    row["waits"] = statistics.median(each(n, "ahead", "waited_s", "elapsed_s"))
    row["ahead_over_not"] = ratio(each(n, "ahead", "elapsed_s", "events"), each(n, "timeline", "elapsed_s", "events"))
    return row


def plot(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    events = [row["events"] for row in rows]
    axes.loglog(events, [row["per_impression_ms"] for row in rows], "s--", label="one reading per impression")
    axes.loglog(events, [row["timeline_ms"] for row in rows], "o-", label="one reading per timeline (vista train)")
    axes.set(xlabel="events in the history", ylabel="training, ms of a processor per impression")
    axes.set_title("Cost of training and history length")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


# -- memory


def window_step(size: str, events: int, folder: Path) -> dict[str, float]:
    """Make one step over a window; to be called in a process of its own."""
    config = resolve(size)
    segments = -(-events // config.model.segment_events)
    config = resolve(size, overrides={"train.window_segments": segments, "train.segments_per_step": segments})
    feed = make_feed(events, config, 1, every=max(1, events // WINDOW_REQUESTS))
    trainer = make_trainer(feed, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = next(by_timeline(feed, 0))
    trainer.train_step(step)
    folded = step.portions[0].step.batch.segment.numel()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"events": folded, "before_gb": before * 1024 / 1e9, "most_gb": most * 1024 / 1e9}


def memory(sizes: list[str], window: int) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--one-window", size, "--window", str(window)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"size": size, **json.loads(output)})
    return rows


# -- sparse gradients


def embeddings(num_items: int, repeats: int, folder: Path) -> list[dict[str, float]]:
    feed = make_feed(1_000, resolve("small"), 64, num_items)
    ways = {sparse: make_trainer(feed, folder / str(sparse), num_items, sparse) for sparse in (True, False)}
    pairs = []
    for repeat in range(repeats + 1):
        cost = {}
        for sparse, trainer in ways.items():
            cost[sparse] = measure_steps(trainer, islice(by_timeline(feed, repeat), EMBEDDING_STEPS))["cpu_s"]
        pairs.append(cost[False] / cost[True])
    return [{"items": num_items, "dense_over_sparse": statistics.median(pairs[1:])}]


# -- all of it


def print_table(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else f"{v}" for v in row.values()) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = ["throughput", "memory", "embeddings"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--window", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--one-window", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for train_scaling.json and train_scaling.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if arguments.one_window:
            print(json.dumps(window_step(arguments.one_window, arguments.window, Path(made))))
            return
        machine = platform.processor() or platform.machine()
        print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        measures = {
            "throughput": lambda: throughput(sorted(arguments.lengths), arguments.repeats, Path(made)),
            "memory": lambda: memory(arguments.sizes, arguments.window),
            "embeddings": lambda: embeddings(arguments.items, arguments.repeats, Path(made)),
        }
        found: dict[str, list[dict[str, Any]]] = {}
        for section in arguments.only:
            found[section] = measures[section]()
            print_table(found[section])
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "train_scaling.json").write_text(json.dumps(found, indent=2) + "\n")
        if "throughput" in found:
            plot(found["throughput"], arguments.out / "train_scaling.png")


if __name__ == "__main__":
    main()
