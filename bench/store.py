"""Batched reads of every engine beside a raw memory map, and what decoding them adds.

    python bench/store.py [--records 4000] [--tokens 256] [--width 64] [--codec int8] [--repeats 300] [--out FOLDER]

A batch is 64 random users. Two limits stand beside the engines: a memory map of the same records, copied into a batch
of bytes, and a memory map of the tokens as float32, copied into the very tensor that decoding writes. In every repeat
all contenders read the same users, in an order that changes; a ratio is taken within a repeat, and its median and
quartiles over the repeats are shown. On a busy machine elapsed time is longer by what others took, the more the longer
a read is; processor time of this process is not, but has no part of what a server does. Redis or Valkey takes part over
a unix socket where a server is installed. Also: the bytes that each engine keeps per record.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vista.store.contract import SummaryStore, open_store
from vista.store.record import CODECS, Record, decode_tokens, encode, unpack, user_key
from vista.store.redis_store import bucket_of, record_key
from vista.store.versions import member

VERSION = "measured-version"
BATCH, AT_ONCE = 64, 256  # users read together, records written together
RECENT = {"item": np.int32, "action": np.int16, "timestamp_us": np.int64, "gap_us": np.int64}
SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
CLOCKS = ("elapsed", "processor")
Read = Callable[[np.ndarray], Any]


def records(count: int, num_tokens: int, width: int, recent: int) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    events = {f"recent_{name}": np.arange(recent).astype(dtype) for name, dtype in RECENT.items()}
    for user in range(count):
        tokens = rng.normal(size=(num_tokens, width)).astype(np.float32)
        yield Record("tokens", VERSION, user_key(user), 1, recent, {"tokens": tokens, **events})


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a server of our own."""
    socket = folder / "socket"
    process = subprocess.Popen([str(SERVER), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir",
                                str(folder), "--appendonly", "yes", "--appendfsync", "always"],
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        while not socket.exists():
            time.sleep(0.01)
        yield f"unix:{socket}"
    finally:
        process.kill()
        process.wait()


def memory_map(path: Path, rows: np.ndarray) -> np.memmap:
    np.save(path, rows)
    mapped = np.load(path, mmap_mode="r")
    mapped.sum()  # all pages are there
    return mapped


def contenders(folder: Path, stores: dict[str, SummaryStore], rows: np.ndarray, tokens: np.ndarray) -> dict[str, Read]:
    """What is measured, by name. rows: records as stored, (N, bytes) uint8; tokens (N, K, D) float32."""
    raw, raw_tokens = memory_map(folder / "rows.npy", rows), memory_map(folder / "tokens.npy", tokens)
    batch, tensor = np.empty((BATCH, rows.shape[1]), np.uint8), np.empty((BATCH, *tokens.shape[1:]), np.float32)
    keys = [user_key(user) for user in range(len(rows))]

    def copied(source: np.ndarray, target: np.ndarray) -> Read:
        def read(users: np.ndarray) -> None:
            for place, user in enumerate(users.tolist()):
                target[place] = source[user]

        return read

    def records_of(store: SummaryStore) -> Read:
        return lambda users: store.get_many("tokens", [keys[user] for user in users.tolist()], VERSION)

    def decoded(store: SummaryStore) -> Read:
        read = records_of(store)
        return lambda users: decode_tokens([unpack(blob, VERSION) for blob in read(users)], out=tensor)

    found: dict[str, Read] = {"map of records": copied(raw, batch), "map of float32 tokens": copied(raw_tokens, tensor)}
    for name, store in stores.items():
        found |= {name: records_of(store), f"{name}, decoded": decoded(store)}
    return found


def measure(reads: dict[str, Read], num_records: int, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of every repeat, elapsed and of the processor (2, repeats), by contender.

    All of a repeat read the same users, each time in another order.
    """
    rng, seconds = np.random.default_rng(1), {name: np.zeros((2, repeats)) for name in reads}
    for repeat in range(-3, repeats):  # the first three warm up, and are overwritten at the end
        users = rng.integers(0, num_records, BATCH)
        for name in rng.permutation(list(reads)):
            start = time.perf_counter(), time.thread_time()
            reads[name](users)
            seconds[name][:, repeat] = time.perf_counter() - start[0], time.thread_time() - start[1]
    return seconds


def ratio(seconds: np.ndarray, limit: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(seconds / limit, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}


def kept_bytes(folder: Path, stores: dict[str, SummaryStore], num_records: int) -> dict[str, float]:
    """Bytes per record on disk (LMDB) and in the server's memory."""
    found = {"lmdb": sum(p.stat().st_blocks * 512 for p in (folder / "lmdb").rglob("*.mdb")) / num_records}
    if "redis" in stores:
        name = member("tokens", user_key(7))
        client: Any = stores["redis"]._client  # type: ignore[attr-defined]
        found["redis"] = client.memory_usage(record_key(bucket_of(VERSION, user_key(7)), name))
    return found


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    made = list(records(arguments.records, arguments.tokens, arguments.width, arguments.recent))
    blobs = [encode(record, arguments.codec) for record in made]
    size = len(encode(made[0], arguments.codec))
    rows = np.stack([np.frombuffer(blob[:size].ljust(size, b"\0"), np.uint8) for blob in blobs])
    with ExitStack() as stack:
        urls = {"lmdb": f"lmdb:{folder / 'lmdb'}", "memory": "memory:measured"}
        urls |= {"redis": stack.enter_context(server(folder))} if SERVER else {}
        stores = {name: stack.enter_context(open_store(url)) for name, url in urls.items()}
        for store in stores.values():
            store.begin_version(VERSION, arguments.tokens, arguments.width, len(made))
            for start in range(0, len(made), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                writes = [("tokens", r.user_key, blob) for r, blob in zip(made[part], blobs[part], strict=True)]
                store.commit(writes, VERSION)
        reads = contenders(folder, stores, rows, np.stack([record.arrays["tokens"] for record in made]))
        seconds = measure(reads, len(made), arguments.repeats)
        kept = kept_bytes(folder, stores, len(made))
    limits = ("map of records", "map of float32 tokens")
    return {
        "tokens": arguments.tokens, "width": arguments.width, "codec": arguments.codec, "records": len(made),
        "record_bytes": size, "kept_bytes_per_record": kept,
        "time_over": {
            limit: {
                name: {clock: ratio(s[n], seconds[limit][n]) for n, clock in enumerate(CLOCKS)}
                for name, s in seconds.items()
            }
            for limit in limits
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256, help="recent events in a record")
    parser.add_argument("--codec", choices=CODECS, default="int8")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path, help="folder for store.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments)
    print(f"{platform.processor() or platform.machine()}: {result['records']:,} records of {result['record_bytes']:,} "
          f"bytes, {arguments.tokens} x {arguments.width} {arguments.codec}, batches of {BATCH}")  # fmt: skip
    for limit, rows in result["time_over"].items():
        print(f"time over that of a {limit}, median (quartiles): {', '.join(CLOCKS)}")
        for name, row in rows.items():
            shown = (f"{row[c]['median']:7.2f}  ({row[c]['low']:.2f} to {row[c]['high']:.2f})" for c in CLOCKS)
            print(f"  {name:24}{''.join(f'{text:26}' for text in shown)}")
    print("bytes kept per record:", ", ".join(f"{n} {b:,.0f}" for n, b in result["kept_bytes_per_record"].items()))
    if not SERVER:
        print("no redis: install the Debian package valkey-server or redis-server")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "store.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
