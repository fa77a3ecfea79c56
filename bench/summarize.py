"""A new model version needs new summaries: what replaying every history costs, interrupted half-way and resumed.

    python bench/summarize.py [--users 1024] [--events 1000] [--spread 0] [--size small] [--workers 2] [--out FOLDER]

Writes random histories, of equal or very different lengths, trains a model for a few steps (its quality does not
matter here), and runs `vista summarize`: with one worker and with several, alternating; one run is interrupted
(Ctrl-C) about half-way, the next one goes on. Prints events and users per second, what more workers give, bytes per
user in the store, how much work the interruption cost, and what a million users with 10,000 events each would take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

import vista
from vista.store.contract import open_store

NUM_ITEMS = 20_000
MANY_USERS, MANY_EVENTS = 1_000_000, 10_000
LEAST_S = 0.05  # between two looks at the store


def write_log(path: Path, users: int, events: int, spread: float) -> None:
    """Histories of log-normal lengths, ``events`` on average. spread: standard deviation of the log; 0: all equal."""
    rng = np.random.default_rng(0)
    lengths = np.rint(events * rng.lognormal(-(spread**2) / 2, spread, users)).astype(np.int64).clip(1)
    size = int(lengths.sum())
    gaps = np.cumsum(rng.integers(1, 3600, size))
    first = np.repeat(gaps[np.cumsum(lengths) - lengths], lengths)
    columns = {"user_id": np.repeat(np.arange(users), lengths), "item_id": rng.zipf(1.2, size) % NUM_ITEMS,
               "timestamp": 1_500_000_000 + gaps - first}  # fmt: skip
    pl.DataFrame(columns).write_parquet(path)


def start(run: Path, data: Path, store: Path, workers: int = 1) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "vista.cli.main",
        "summarize",
        str(run),
        "--data",
        str(data),
        "--store",
        str(store),
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def users_in(store: Path) -> int:
    """Users with a record so far; 0 while there is no store."""
    if not (store / "CURRENT").exists():  # the folder is there a moment before
        return 0
    with open_store(str(store), read_only=True) as opened:
        return sum(info.num_users for info in opened.versions())


def interrupted(run: Path, data: Path, store: Path, users: int) -> tuple[float, int]:
    """Seconds until Ctrl-C was sent, and users that were stored when the process had ended."""
    started = time.perf_counter()
    process = start(run, data, store)
    while process.poll() is None and users_in(store) < users // 2:
        time.sleep(LEAST_S)
    process.send_signal(signal.SIGINT)
    process.communicate()
    return time.perf_counter() - started, users_in(store)


def finished(run: Path, data: Path, store: Path, workers: int = 1) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    started = time.perf_counter()
    process = start(run, data, store, workers)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return time.perf_counter() - started, out


def ratios(folder: Path, workers: int, repeats: int) -> list[float]:
    """How much faster several workers are than one, by elapsed time; one ratio per repeat."""
    found = []
    for _ in range(repeats):
        seconds = []
        for count in (1, workers):
            shutil.rmtree(folder / "store", ignore_errors=True)
            seconds.append(finished(folder / "run", folder / "data", folder / "store", count)[0])
        found.append(seconds[0] / seconds[1])
    return found


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    users, size = arguments.users, arguments.size
    write_log(folder / "log.parquet", users, arguments.events, arguments.spread)
    vista.prepare(folder / "log.parquet", folder / "data", max_requests=5_000)
    vista.train(folder / "data", folder / "run", size=size, max_steps=3, quiet=True)
    whole_s, out = finished(folder / "run", folder / "data", folder / "whole")
    num_events = int(re.findall(r"\(([\d,]+) events\)", out)[0].replace(",", ""))
    nothing_s, _ = finished(folder / "run", folder / "data", folder / "whole")  # all current: the cost of starting
    first_s, kept = interrupted(folder / "run", folder / "data", folder / "cut", users)
    second_s, out = finished(folder / "run", folder / "data", folder / "cut")
    resumed = int(re.findall(r"summarized ([\d,]+) users", out)[0].replace(",", ""))
    work_s = whole_s - nothing_s
    stored = sum(path.stat().st_blocks * 512 for path in (folder / "whole").rglob("*") if path.is_file())
    return {
        "users": users,
        "events_per_user": num_events / users,
        "events_per_s": num_events / work_s,
        "users_per_s": users / work_s,
        "workers_to_one": float(np.median(ratios(folder, arguments.workers, arguments.repeats))),
        "store_bytes_per_user": stored / users,
        "kept_at_interruption": kept,
        "summarized_after_it": resumed,
        "interrupted_to_whole": (first_s + second_s - nothing_s) / whole_s,
        "core_hours_for_many": MANY_USERS * MANY_EVENTS / (num_events / work_s) / 3600,
    }


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the interrupted run would ignore it in the background
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_024)
    parser.add_argument("--events", type=int, default=1_000)
    parser.add_argument("--spread", type=float, default=0.0, help="of lengths: 1.5 for one in a hundred at ten times")
    parser.add_argument("--size", default="small")
    parser.add_argument("--workers", type=int, default=2, help="to compare with one")
    parser.add_argument("--repeats", type=int, default=1, help="of the comparison")
    parser.add_argument("--out", type=Path, help="folder for summarize.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), arguments)
    print(f"{platform.processor() or platform.machine()}, one thread, size {arguments.size}")
    print(f"{row['events_per_user']:,.0f} events per user on average")
    print(f"one worker: {row['events_per_s']:,.0f} events/s, {row['users_per_s']:,.1f} users/s")
    print(f"{arguments.workers} workers are {row['workers_to_one']:.2f} times as fast as one, their start included")
    print(f"{row['store_bytes_per_user']:,.0f} bytes per user in the store (tokens and state)")
    print(f"interrupted with {row['kept_at_interruption']:,} users stored, {row['summarized_after_it']:,} left; "
          f"both together took {row['interrupted_to_whole']:.2f} times one whole run")  # fmt: skip
    print(f"{MANY_USERS:,} users with {MANY_EVENTS:,} events: {row['core_hours_for_many']:,.0f} core hours")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "summarize.json").write_text(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
