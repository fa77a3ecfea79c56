"""What one core does, for `vista plan`: processor time of bulk, refresh and read through the product's own code.

    python bench/plan.py --size base [--repeats 5]        a fresh model of a size
    python bench/plan.py --run RUN [--codec int8]         your model

Prints the options of `vista plan` that make it plan with this machine's numbers, the median over repeats, and beneath
how far the repeats lie apart. One thread; processor time, so that other work on the machine counts for little.
Bulk: `summarize_users` and encoding, short and long histories. Refresh: `vista stream` from a log in a folder into an
LMDB store, each user with one new event in a micro-batch, and with many. Bytes written are those that this
process hands to the system (Linux).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.checkpoint import Run, load_run
from vista.config import SIZES, resolve
from vista.data.histories import Histories
from vista.jobs.fold import summarize_users
from vista.jobs.sources.contract import open_source
from vista.jobs.sources.directory import DirectoryLog
from vista.jobs.stream import Stream, StreamOptions
from vista.planning.sizes import fresh_run, log_entries
from vista.store.contract import SummaryStore, open_store
from vista.store.record import CODECS, decode_tokens, encode, unpack, user_key
from vista.updates.apply import UpdateOptions

USERS, SHORT, LONG = 128, 1, 8  # folded together: users, and the segments of their histories
FEW, MANY = 1, 16  # events of each user in a micro-batch
BATCHES = {FEW: 16, MANY: 4}  # micro-batches of each kind
BATCH, READS = 64, 32  # users read together, such batches
NOTHING = 1e-3  # where a line's slope or height comes out at nothing, or below
Numbers = dict[str, float]


def processor_s(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def bulk(run: Run, codec: str) -> Numbers:
    """A line through short and long histories: per event, and per user."""
    seconds = []
    lengths = [segments * run.config.model.segment_events for segments in (SHORT, LONG)]
    for length in (lengths[0], *lengths):  # the first one warms up
        rng = np.random.default_rng(0)
        size = USERS * length
        first = run.catalogue.first_item
        item = rng.integers(first, run.catalogue.num_indices, size).astype(np.int32)
        times = 10**15 + np.tile(np.arange(length), USERS) * 60_000_000
        log = Histories(np.arange(USERS + 1) * length, item, np.zeros(size, np.int16), times)

        def fold(log: Histories = log) -> None:
            users = np.arange(USERS)
            for record in summarize_users(run.sequence_model, log, users, users, run.version):
                encode(record, codec)

        seconds.append(processor_s(fold) / USERS)
    event_s = (seconds[2] - seconds[1]) / (lengths[1] - lengths[0])
    return {"bulk_event_us": event_s * 1e6, "bulk_user_ms": (seconds[1] - lengths[0] * event_s) * 1e3}


def refresh(run: Run, codec: str, store: SummaryStore, folder: Path) -> Numbers:
    """A line through micro-batches with one and with many events per user; bytes written per byte of record."""
    log, users, told = DirectoryLog(folder / "log"), list(range(USERS)), 0
    segment = run.config.model.segment_events
    phases = (log_entries(run, [user], 0, 1 + user * segment // USERS) for user in users)
    log.append([entry for entries in phases for entry in entries])  # so that segments end at different times
    update = UpdateOptions(codec=codec)
    options = StreamOptions(
        folder / "dead", max_events=MANY * USERS, until_end=True, begin=True, quiet=True, update=update
    )
    seconds: dict[int, float] = {}
    written = stored = 0  # by micro-batches of few events: records grow with what a sketch has met
    for num, repeats in ((0, 1), (FEW, BATCHES[FEW]), (MANY, BATCHES[MANY])):
        spent = 0.0
        for _ in range(repeats):
            if num:
                log.append(log_entries(run, users, segment + told, num))
                told += num
            with open_source(f"dir:{folder / 'log'}") as source:
                stream = Stream(run, store, source, options)
                before = bytes_written()
                spent += processor_s(stream.go)
                if num == FEW:
                    written += bytes_written() - before
                    stored += sum(row.num_bytes for row in store.statistics() if row.kind in ("tokens", "state"))
        seconds[num] = spent / repeats / USERS
    event_s = (seconds[MANY] - seconds[FEW]) / (MANY - FEW)
    return {
        "refresh_ms": (seconds[FEW] - FEW * event_s) * 1e3,
        "refresh_event_us": event_s * 1e6,
        "write_amplification": written / stored,
    }


def read(run: Run, store: SummaryStore) -> Numbers:
    rng = np.random.default_rng(0)

    def reads() -> None:
        for _ in range(READS):
            keys = [user_key(user) for user in rng.integers(0, USERS, BATCH).tolist()]
            blobs = store.get_many("tokens", keys, run.version)
            decode_tokens([unpack(blob, run.version) for blob in blobs if blob is not None])

    reads()
    return {"read_us": processor_s(reads) / (READS * BATCH) * 1e6}


def bytes_written() -> int:
    """Bytes this process has handed to the system to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def measure(run: Run, codec: str) -> Numbers:
    with tempfile.TemporaryDirectory() as name, open_store(str(Path(name) / "store")) as store:
        return bulk(run, codec) | refresh(run, codec, store, Path(name)) | read(run, store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--run", type=Path, help="a trained model, instead of a fresh one of a size")
    parser.add_argument("--codec", choices=CODECS, default="int8")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = load_run(arguments.run) if arguments.run is not None else fresh_run(resolve(arguments.size))
    found = [measure(run, arguments.codec) for _ in range(arguments.repeats)]
    columns = {name: [max(numbers[name], NOTHING) for numbers in found] for name in found[0]}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, {run.folder}, "
          f"codec {arguments.codec}")  # fmt: skip
    print(" ".join(f"--{n.replace('_', '-')} {statistics.median(c):.4g}" for n, c in columns.items()))
    print("least to most: " + ", ".join(f"{n} {min(c):.4g} to {max(c):.4g}" for n, c in columns.items()))


if __name__ == "__main__":
    main()
