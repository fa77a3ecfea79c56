"""The online server under load: does a ranking cost the same after a million events, and what happens at too many.

    python bench/serve.py [--lengths 1000 100000] [--candidates 100 1000] [--overload-s 10] [--out FOLDER]

Runs `vista serve` as a process of its own on a fresh model (what a request costs does not depend on training). One made
history is folded by the library's summarizer; its states after each of the lengths are the records of the users asked
about. Then:

*Length.* The same requests of users with histories of each length, in an order that changes from round to round, one
at a time and eight at a time. A ratio to the shortest history is taken within a round, and its median is shown. Beside
it, in this process: the scorer alone, and `din`, target attention over all raw events, on the same candidates.

*Overload.* The most that eight connections get is the capacity. Then requests arrive at a multiple of it (open loop:
at random times fixed beforehand, answered or not), and time counts from when a request was due, not from when this
process came to send it. The server's memory is read from /proc once a second.

*Outage.* A server of Redis or Valkey holds the store; it is killed and started again under load, without and with
`--degrade`.

Elapsed times of a busy machine are longer by what others took; ratios and processor time are what to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from served.asked import (
    BODIES,
    NOW_US,
    NUM_ITEMS,
    Cell,
    bodies,
    catalogue,
    config_of,
    fill,
    history,
    small_run,
    user_of,
)
from served.processes import REDIS, Answer, Redis, Server, closed_loop, open_loop, serving

from vista.checkpoint import Run
from vista.models.baselines.base import with_absent
from vista.models.batch import Requests
from vista.models.embeddings import ItemTables
from vista.models.vista import make_model
from vista.serving.scorer import Scorer
from vista.store.contract import open_store

AT_ONCE = 8  # connections of the loads that are answered before they ask again
WORKED_S = 0.2  # at least, of a round's measurement
DEADLINE_S = 2.0  # of the server's default


# -- length


def measure_lengths(server: Server, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cell: times of single requests, requests a second, and processor time of the server per request."""
    cells = [(length, candidates) for candidates in chosen.candidates for length in sorted(chosen.lengths)]
    asks = {cell: bodies(cell, chosen.users) for cell in cells}
    counts = {}
    for cell in cells:  # warm up, and find how many requests make a round
        single_s, _ = asyncio.run(closed_loop(server.port, asks[cell], 1, BODIES))
        counts[cell] = max(int(WORKED_S / statistics.median(single_s)), AT_ONCE)
    single: dict[Cell, list[list[float]]] = {cell: [] for cell in cells}
    rate: dict[Cell, list[float]] = {cell: [] for cell in cells}
    processor: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for _ in range(chosen.rounds):
        for cell in random.sample(cells, len(cells)):
            count = max(counts[other] for other in cells if other[1] == cell[1])
            single[cell].append(asyncio.run(closed_loop(server.port, asks[cell], 1, count))[0])
            before_s = server.processor_s()
            _, all_s = asyncio.run(closed_loop(server.port, asks[cell], AT_ONCE, count))
            processor[cell].append((server.processor_s() - before_s) / count)
            rate[cell].append(count / all_s)
    return [length_row(cell, min(chosen.lengths), single, rate, processor) for cell in cells]


def length_row(
    cell: Cell,
    shortest: int,
    single: dict[Cell, list[list[float]]],
    rate: dict[Cell, list[float]],
    processor: dict[Cell, list[float]],
) -> dict[str, Any]:
    base = (shortest, cell[1])
    p50_s, p99_s = np.quantile(np.concatenate(single[cell]), (0.5, 0.99)).tolist()
    medians = {c: [statistics.median(round_s) for round_s in single[c]] for c in (cell, base)}
    return {
        "events": cell[0], "candidates": cell[1], "requests": sum(map(len, single[cell])),
        "p50_ms": 1000 * p50_s, "p99_ms": 1000 * p99_s, "requests_per_s": statistics.median(rate[cell]),
        "processor_ms": 1000 * statistics.median(processor[cell]),
        "p50_over_shortest": ratio(medians[cell], medians[base]),
        "requests_per_s_over_shortest": ratio(rate[cell], rate[base]),
        "processor_over_shortest": ratio(processor[cell], processor[base]),
    }  # fmt: skip


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


@torch.no_grad()
def measure_raw(run: Run, url: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Processor time of one ranking in this process, from the store and by full target attention over raw events."""
    rows = []
    with open_store(url, read_only=True) as store:
        scorer = Scorer(run, store)
        for candidates in chosen.candidates:
            items = np.random.default_rng(candidates).choice(NUM_ITEMS, candidates, replace=False)
            expected_s = 0.0
            for length in sorted(chosen.lengths):
                user = user_of(length, 0)
                stored_s = fastest_s(lambda: scorer.rank([user], [items], NOW_US), chosen.rounds)  # noqa: B023
                row = {"events": length, "candidates": candidates, "stored_ms": 1000 * stored_s, "raw_ms": None}
                growth = length / rows[-1]["events"] if rows and rows[-1]["candidates"] == candidates else 1
                if expected_s * growth < chosen.longest_s:
                    raw = raw_ranking(length, items, chosen)
                    expected_s = fastest_s(raw, chosen.rounds if expected_s * growth < 1 else 1)
                    row["raw_ms"] = 1000 * expected_s
                else:
                    expected_s *= growth
                rows.append(row)
    return rows


def fastest_s(work: Callable[[], object], rounds: int) -> float:
    """Processor time of this process, the least of the rounds."""
    work()
    found = []
    for _ in range(rounds):
        began_s = process_time()
        work()
        found.append(process_time() - began_s)
    return min(found)


def raw_ranking(length: int, items: np.ndarray, chosen: argparse.Namespace) -> Callable[[], object]:
    """`din` on one request, from raw events to probabilities; its event vectors are made anew, as nothing is kept."""
    config, known = config_of(chosen, model="din", history_events=length), catalogue()
    model: Any = make_model(config.model, ItemTables.of(known), 1, 1, (), 0).eval()
    events, candidate = history(length), torch.from_numpy(known.encode(items).astype(np.int64))[None]
    requests = Requests(
        torch.zeros(1, dtype=torch.int64), torch.arange(length)[None], events.item[None], events.timestamp_us[None],
        torch.tensor([NOW_US]), torch.tensor([length]), candidate, torch.zeros(1, len(items), 0),
    )  # fmt: skip

    def rank() -> torch.Tensor:
        with torch.no_grad():
            event_x = model.embedding(events.item, events.action, events.timestamp_us, events.gap_us)
            return model.rank(with_absent(model.project(event_x)), requests).sigmoid()

    return rank


# -- overload and outage


async def capacity(port: int, asks: Sequence[bytes], seconds: float, connections: int = AT_ONCE) -> float:
    """Requests a second that some connections get, the best of three."""
    _, warm_s = await closed_loop(port, asks, connections, 2 * BODIES)
    count = max(int(seconds / 3 * 2 * BODIES / warm_s), connections)
    return max([count / (await closed_loop(port, asks, connections, count))[1] for _ in range(3)])


async def watched(server: Server, load: Any) -> tuple[Any, list[float]]:
    """What a load gives, and the server's memory in MiB, once a second and at the end."""
    task, memory = asyncio.create_task(load), []
    while not task.done():
        memory.append(server.memory_mib())
        await asyncio.wait([task], timeout=1)
    return await task, [*memory, server.memory_mib()]


def measure_overload(server: Server, most: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """most: the capacity, requests a second."""
    cell = (max(chosen.lengths), min(chosen.candidates))
    asks = bodies(cell, chosen.users)
    asyncio.run(closed_loop(server.port, asks, 1, 2 * BODIES))
    load = open_loop(server.port, asks, chosen.times * most, chosen.overload_s)
    answers, memory = asyncio.run(watched(server, load))
    taken_s = [a.took_s for a in answers if a.status == 200]
    half = len(memory) // 2
    after_s, _ = asyncio.run(closed_loop(server.port, asks, 1, BODIES))
    return {
        "events": cell[0], "candidates": cell[1], "seconds": chosen.overload_s, "times_capacity": chosen.times,
        "capacity_per_s": most, "asked_per_s": len(answers) / chosen.overload_s,
        "answered_per_s": len(taken_s) / chosen.overload_s,
        "answered_over_capacity": len(taken_s) / chosen.overload_s / most,
        "statuses": dict(sorted(Counter(a.status for a in answers).items())),
        "answered_p50_ms": quantile_ms(taken_s, 0.5), "answered_p99_ms": quantile_ms(taken_s, 0.99),
        "answered_slowest_ms": quantile_ms(taken_s, 1), "deadline_ms": 1000 * DEADLINE_S,
        "answered_within_deadline": float(np.mean(np.array(taken_s) <= DEADLINE_S)) if taken_s else 0.0,
        "refused_p99_ms": quantile_ms([a.took_s for a in answers if a.status == 429], 0.99),
        "sent_late_p99_ms": quantile_ms([a.late_s for a in answers], 0.99),
        "memory_mib": {"before": memory[0], "half": memory[half], "end": memory[-1]},
        "p50_ms_after": quantile_ms(after_s, 0.5),
    }  # fmt: skip


def quantile_ms(seconds: Sequence[float], share: float) -> float | None:
    return 1000 * float(np.quantile(seconds, share)) if len(seconds) else None


def measure_outage(run: Run, folder: Path, degrade: bool, chosen: argparse.Namespace) -> dict[str, Any]:
    """The store is there, away, and there again, for as long each: what is answered, and how soon it is as before."""
    redis, span_s = Redis(folder), chosen.outage_s
    cell = (min(chosen.lengths), min(chosen.candidates))
    asks = bodies(cell, chosen.users)
    try:
        fill(run, redis.url, [cell[0]], chosen.users)
        with serving(run.folder, redis.url, folder, *(["--degrade"] if degrade else [])) as server:
            rate = asyncio.run(capacity(server.port, asks, 2, 1)) / 2

            async def load() -> tuple[list[Answer], float]:
                task = asyncio.create_task(open_loop(server.port, asks, rate, 3 * span_s))
                await asyncio.sleep(span_s)
                redis.kill()
                await asyncio.sleep(span_s)
                redis.start()
                return await task, 2 * span_s

            answers, back_s = asyncio.run(load())
    finally:
        redis.kill()
    fine = [a for a in answers if a.status == 200 and not a.is_degraded and a.due_s > back_s]
    spans = [[a for a in answers if first <= a.due_s / span_s < first + 1] for first in range(3)]
    kinds = [Counter(f"{a.status}{' degraded' if a.is_degraded else ''}" for a in span) for span in spans]
    return {
        "degrade": degrade, "requests_per_s": rate, "seconds_each": span_s,
        **{name: dict(kind) for name, kind in zip(("before", "away", "back"), kinds, strict=True)},
        "away_p99_ms": quantile_ms([a.took_s for a in spans[1]], 0.99),
        "whole_again_after_s": min(a.due_s for a in fine) - back_s if fine else None,
    }  # fmt: skip


# -- tables


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = ["| events | candidates | p50 | p99 | requests/s | processor per request | over the shortest history |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['events']:,} | {row['candidates']:,} | {row['p50_ms']:.1f} ms | {row['p99_ms']:.1f} ms | "
        f"{row['requests_per_s']:.0f} | {row['processor_ms']:.1f} ms | p50 {row['p50_over_shortest']:.2f}, requests/s "
        f"{row['requests_per_s_over_shortest']:.2f}, processor {row['processor_over_shortest']:.2f} |"
        for row in result["lengths"]
    ]
    lines += ["", "| events | candidates | from the store | din, all raw events | times |", "|---|---|---|---|---|"]
    for row in result["raw"]:
        raw = "not run" if row["raw_ms"] is None else f"{row['raw_ms']:,.1f} ms"
        times = "" if row["raw_ms"] is None else f"{row['raw_ms'] / row['stored_ms']:,.1f}"
        lines.append(f"| {row['events']:,} | {row['candidates']:,} | {row['stored_ms']:.1f} ms | {raw} | {times} |")
    for title, rows in (("overload", [result["overload"]]), ("outage", result["outages"])):
        for row in rows:
            lines += ["", f"| {title} | |", "|---|---|"]
            lines += [f"| {name.replace('_', ' ')} | {shown(value)} |" for name, value in row.items()]
    return lines


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items())
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    run, url = small_run(folder / "run", chosen), str(folder / "store")
    fill(run, url, chosen.lengths, chosen.users)
    with serving(run.folder, url, folder / "patient", "--timeout-s", "60") as server:
        lengths = measure_lengths(server, chosen)
        asks = bodies((max(chosen.lengths), min(chosen.candidates)), chosen.users)
        most = asyncio.run(capacity(server.port, asks, min(chosen.overload_s, 10)))
    with serving(run.folder, url, folder / "plain") as server:
        overload = measure_overload(server, most, chosen)
    outages = [measure_outage(run, folder / f"redis-{d}", d, chosen) for d in (False, True)] if REDIS else []
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "python": platform.python_version(), "torch": torch.__version__,
                    "vista": version_of("vista-recsys")},
        "settings": {name: value for name, value in vars(chosen).items() if name != "out"},
        "lengths": lengths, "raw": measure_raw(run, url, chosen), "overload": overload, "outages": outages,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 100_000], help="events of a history")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--users", type=int, default=16, help="of each length; they share one history")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--overload-s", type=float, default=10)
    parser.add_argument("--times", type=float, default=3, help="the overload, in capacities")
    parser.add_argument("--outage-s", type=float, default=4, help="before, without, and with the store again")
    parser.add_argument("--longest-s", type=float, default=20, help="raw rankings expected to take longer are not run")
    parser.add_argument("--size", default="small")
    parser.add_argument("--set", nargs="*", default=[], help="other settings, as in model.num_seeds=64")
    parser.add_argument("--out", type=Path, help="folder for serve.json and serve.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), chosen)
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    text = "\n".join([f"{machine}; times are of a busy machine: compare ratios", "", *tables(result)]) + "\n"
    print(text if REDIS else text + "no outage measured: install the Debian package valkey-server or redis-server")
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "serve.json").write_text(json.dumps(result, indent=2) + "\n")
        (chosen.out / "serve.md").write_text(text)


if __name__ == "__main__":
    main()
