"""What `vista prepare` costs beside polars alone, which only sorts: time and peak memory.

    python bench/prepare.py [--events 2000000] [--ids integer] [--repeats 3] [--folder FOLDER] [--out FOLDER]

Makes a Parquet log for each number of events, then alternates, each in a process of its own:

- polars: reads the log, sorts it by user and time and writes it again (lazily, streaming engine, zstd as in the log).
- vista: `vista prepare` with its defaults. It sorts as well, and on the way checks every time, drops duplicates, makes
  up to two million requests with negatives, splits them, builds the catalogue and takes a checksum of every file.

Seconds count from start to end of a process, imports included. Prints the median of both, the median of the ratios of
runs side by side and its spread, the same ratio of processor time (steadier on a busy machine), the peak resident
memory of both, and whether vista takes at most three times as long and stays under 8 GB.

The log is one as a service writes it: rows in order of arrival, all users interleaved. The time of an event is up to
some minutes before its arrival, and of one event in a hundred (a phone that was offline) up to some days. Users are
drawn with log-normal weights, one for each 200 events: half of the users have fewer than 70, the busiest has tens of
thousands. Items are drawn with frequency 1 / rank, one for each 50 events; actions are four strings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_PER_USER, EVENTS_PER_ITEM = 200, 50
USER_SPREAD = 1.5  # standard deviation of the logarithm of a user's weight
START_S, SPAN_S = 1_600_000_000, 3 * 31_556_952
LATE_SHARE, DELAY_S, LATE_DELAY_S = 0.01, 60, 86_400  # mean delays between an event and its arrival
ACTIONS, ACTION_SHARES = ("view", "click", "like", "buy"), (0.7, 0.22, 0.06, 0.02)
CHUNK_ROWS = 1_000_000
MOST_TIMES, MOST_GB = 3.0, 8.0
GB = 1e9

POLARS = """
import sys, polars as pl
log, out = sys.argv[1:]
pl.scan_parquet(log).sort("user_id", "timestamp").sink_parquet(out, compression="zstd", engine="streaming")
"""


def write_log(path: Path, events: int, ids: str) -> None:
    """The log described at the top; the same one for the same arguments."""
    import numpy as np
    import polars as pl
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    num_users, num_items = max(1, events // EVENTS_PER_USER), max(2, events // EVENTS_PER_ITEM)
    weights = np.cumsum(rng.lognormal(0, USER_SPREAD, num_users))
    user_ids, item_ids = rng.permutation(num_users), rng.permutation(num_items)  # an id says nothing of frequency
    writer = None
    for first in range(0, events, CHUNK_ROWS):
        size = min(CHUNK_ROWS, events - first)
        arrival = START_S + (first + np.arange(size)) * (SPAN_S / events)
        delay = rng.exponential(np.where(rng.random(size) < LATE_SHARE, LATE_DELAY_S, DELAY_S))
        user = user_ids[np.searchsorted(weights, rng.random(size) * weights[-1])]
        item = item_ids[(num_items ** rng.random(size)).astype(np.int64) - 1]
        action = rng.choice(len(ACTIONS), size, p=ACTION_SHARES)
        chunk = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": (arrival - delay).astype(np.int64)})
        if ids == "string":
            chunk = chunk.with_columns(pl.format("user-{}", "user_id"), pl.format("item-{}", "item_id"))
        table = chunk.with_columns(action=pl.Series(ACTIONS).gather(action)).to_arrow()
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds from start to end, seconds of all its threads on a processor, peak resident gigabytes."""

    seconds: float
    cpu_s: float
    gb: float


def run(command: list[str]) -> Cost:
    """Run a process to its end.

    The peak of a new process begins at that of the one that starts it, so this one must stay small: it imports neither
    polars nor vista.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{output.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / GB)


def measure(folder: Path, events: int, ids: str, repeats: int) -> dict[str, Any]:
    log, sorted_log, data = folder / "log.parquet", folder / "sorted.parquet", folder / "data"
    make_log = [sys.executable, __file__, "--write", str(log), "--events", str(events), "--ids", ids]
    made = run(make_log)
    print(
        f"{events:>11,} events, {ids} ids: {log.stat().st_size / GB:.2f} GB, made in {made.seconds:.0f} s", flush=True
    )
    sides = {
        "polars": [sys.executable, "-c", POLARS, str(log), str(sorted_log)],
        "vista": [sys.executable, "-m", "vista.cli.main", "prepare", str(log), "--out", str(data)],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, command in sides.items():
            subprocess.run(["rm", "-rf", str(sorted_log), str(data)], check=True)
            cost = run(command)
            costs[name].append(cost)
            print(f"  {name:<7} {cost.seconds:8.1f} s {cost.cpu_s:8.1f} CPU s {cost.gb:7.2f} GB", flush=True)
        have = json.loads((data / "manifest.json").read_text())["statistics"]
        assert have["num_events"] + have["num_duplicates_dropped"] == events, have
    pairs = list(zip(costs["polars"], costs["vista"], strict=True))
    ratios = [ours.seconds / theirs.seconds for theirs, ours in pairs]
    row = {"events": events, "ids": ids, "users": have["num_users"], "longest_history": have["longest_history"]}
    for name, runs in costs.items():
        row[f"{name}_s"] = statistics.median(cost.seconds for cost in runs)
        row[f"{name}_gb"] = max(cost.gb for cost in runs)
    row |= {"ratio": statistics.median(ratios), "least_ratio": min(ratios), "largest_ratio": max(ratios)}
    return row | {"cpu_ratio": statistics.median(ours.cpu_s / theirs.cpu_s for theirs, ours in pairs)}


def is_met(row: dict[str, Any]) -> bool:
    return row["ratio"] <= MOST_TIMES and row["vista_gb"] < MOST_GB


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, unit, label in zip(figure.subplots(1, 2), ("s", "gb"), ("seconds", "peak memory, GB"), strict=True):
        events = [row["events"] for row in rows]
        axes.loglog(events, [row[f"polars_{unit}"] for row in rows], "s--", label="polars: read, sort, write")
        axes.loglog(events, [row[f"vista_{unit}"] for row in rows], "o-", label="vista prepare")
        axes.set(xlabel="events in the log", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    axes.axhline(MOST_GB, color="black", linewidth=0.8, linestyle=":")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--ids", choices=["integer", "string"], default="integer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where log and results stand meanwhile: 60 bytes per event")
    parser.add_argument("--out", type=Path, help="folder for prepare.json and prepare.png")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_log(arguments.write, arguments.events[0], arguments.ids)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(Path(folder), n, arguments.ids, arguments.repeats) for n in sorted(arguments.events)]
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{'events':>11} {'users':>8} {'longest':>8} {'polars s':>9} {'vista s':>8} {'ratio':>6} {'spread':>11} "
          f"{'CPU ratio':>9} {'polars GB':>9} {'vista GB':>8}  verdict")  # fmt: skip
    for row in rows:
        spread = f"{row['least_ratio']:.2f}-{row['largest_ratio']:.2f}"
        print(
            f"{row['events']:>11,} {row['users']:>8,} {row['longest_history']:>8,} {row['polars_s']:>9.1f} "
            f"{row['vista_s']:>8.1f} {row['ratio']:>6.2f} {spread:>11} {row['cpu_ratio']:>9.2f} "
            f"{row['polars_gb']:>9.2f} {row['vista_gb']:>8.2f}  {'met' if is_met(row) else 'missed'}"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "prepare.json").write_text(json.dumps(rows, indent=2) + "\n")
        plot(rows, arguments.out / "prepare.png")


if __name__ == "__main__":
    main()
