"""Processes beside a test: ``python -m tests.store.workers write STORE ...``.

Step s gives a group of users new tokens and states, both as of s, and then prints s: the commit is acknowledged. What
a step writes follows from its number, so a test can hold a store to it.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vista.errors import StoreError
from vista.store import lmdb_store
from vista.store.contract import SummaryStore, open_store
from vista.store.record import Record, decode, encode, unpack, user_key

VERSION = "written-by-steps"
NUM_USERS = 60
TINY_MAP = 1 << 16  # bytes
STORE_ERROR = 3  # exit code of a writer whose store failed


def users_of(step: int, num_users: int) -> list[int]:
    """Who is written in a step."""
    return sorted(np.random.default_rng(step).permutation(NUM_USERS)[:num_users].tolist())


def records_of(user: int, step: int) -> tuple[Record, Record]:
    """Tokens and state of a user as of a step: from a hundred bytes to some pages, larger in later steps."""
    rng = np.random.default_rng([user, step])
    hot = {"tokens": rng.normal(size=(1 + step % 40, 16)).astype(np.float32)}
    cold = {"memory_0": rng.normal(size=7 * step % 6000).astype(np.float32)}
    key = user_key(user)
    return Record("tokens", VERSION, key, 1000 * step, step, hot), Record(
        "state", VERSION, key, 1000 * step, step, cold
    )


def step_of(store: SummaryStore) -> dict[int, int]:
    """The step each user's records are of. Raises AssertionError for anything but what that step wrote."""
    found = {kind: dict(store.scan(kind, VERSION)) for kind in ("tokens", "state", "border")}
    steps = {}
    for user in range(NUM_USERS):
        blobs = [found[kind].pop(user_key(user), None) for kind in ("tokens", "state")]
        if blobs != [None, None]:
            assert None not in blobs, f"user {user}: tokens or state alone"
            step = decode(blobs[0], VERSION).num_events
            assert blobs == [encode(record) for record in records_of(user, step)], f"user {user}, step {step}"
            steps[user] = step
    assert not any(found.values()), "records of nobody"
    return steps


def write(url: str, first_step: int, num_users: int) -> None:
    """Steps without end, each printed when its commit has returned."""
    with open_store(url) as store:
        store.begin_version(VERSION, 1, 16, NUM_USERS)
        for step in itertools.count(first_step):
            records = [record for user in users_of(step, num_users) for record in records_of(user, step)]
            store.commit([(r.kind, r.user_key, encode(r)) for r in records], VERSION)
            os.write(1, b"%d\n" % step)


def read(url: str, duration_s: float) -> None:
    """Read all users at once, again and again; print how many steps were seen. Fails on two at one moment."""
    keys, seen = [user_key(user) for user in range(NUM_USERS)], []
    with open_store(url, read_only=True) as store:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            steps = {unpack(blob, VERSION).num_events for blob in store.get_many("tokens", keys, VERSION) if blob}
            assert len(steps) == 1, f"steps {steps} at one moment"
            assert not seen or min(steps) >= seen[-1], "went back in time"
            seen += steps - set(seen)
    print(len(seen), flush=True)


def compact(path: str) -> None:
    """Compact without end, each time printed when it has returned."""
    with open_store(path) as store:
        for number in itertools.count():
            store.compact()
            os.write(1, b"%d\n" % number)


def follow(url: str, duration_s: float) -> None:
    """Read all users of what is published, again and again; print how often that changed. Fails on a mix."""
    keys, last, num_changes = [user_key(user) for user in range(NUM_USERS)], None, 0
    with open_store(url, read_only=True) as store:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            version = store.published()
            assert version is not None
            found = store.get_many("tokens", keys, version)
            assert found == [b"%s of %s" % (version.encode(), key) for key in keys], f"not all of {version}"
            num_changes, last = num_changes + (version != last), version
    print(num_changes, flush=True)


def fill(path: str, max_file_bytes: int) -> None:
    """Write until no file may grow any more; print the last step and the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    with open_store(path) as store:
        store.begin_version(VERSION, 1, 16, NUM_USERS)
        for step in itertools.count(1):
            records = [record for user in range(NUM_USERS) for record in records_of(user, step)]
            try:
                store.commit([(r.kind, r.user_key, encode(r)) for r in records], VERSION)
            except StoreError as error:
                assert set(step_of(store).values()) == {step - 1}, "the store can no longer be read"
                print(step - 1, error, flush=True)
                return


def start(task: str, *arguments: object) -> subprocess.Popen[str]:
    """A worker as a process of its own."""
    words: Sequence[str] = [sys.executable, "-m", "tests.store.workers", task, *map(str, arguments)]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    lmdb_store.FIRST_MAP_BYTES = TINY_MAP
    match sys.argv[1:]:
        case ["write", url, first_step, num_users]:
            try:
                write(url, int(first_step), int(num_users))
            except StoreError:
                raise SystemExit(STORE_ERROR) from None
        case ["read", url, duration_s]:
            read(url, float(duration_s))
        case ["follow", url, duration_s]:
            follow(url, float(duration_s))
        case ["compact", path]:
            compact(path)
        case ["fill", path, max_file_bytes]:
            fill(path, int(max_file_bytes))
        case words:
            raise SystemExit(f"unknown task {words}")
