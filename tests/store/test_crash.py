"""A writer killed at any moment: what was acknowledged is there, and no user is half one step and half another."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.store.workers import NUM_USERS, VERSION, start, step_of, users_of
from vista.store.contract import open_store

USERS_AT_ONCE = 20


def kill_writers(path: Path, num_kills: int, seed: int) -> tuple[int, int]:
    """Kill a writer so many times and look each time; acknowledged commits, and kills between commit and word of it."""
    moments = random.Random(seed)
    steps: dict[int, int] = {}  # of each user, as acknowledged
    next_step, num_acknowledged, num_unsaid = 1, 0, 0
    for number in range(num_kills):
        writer = start("write", path, next_step, USERS_AT_ONCE)
        assert writer.stdout is not None
        said = []
        if number % 5:  # the others are killed while Python starts, or while the store is opened
            said.append(writer.stdout.readline())
        time.sleep(moments.uniform(0, 0.05 if number % 5 else 0.5))
        writer.kill()
        said += writer.stdout.readlines()
        writer.stdout.close()
        assert writer.wait() == -9, "the writer ended before it was killed"
        acknowledged = [int(line) for line in said if line.endswith("\n")]
        assert acknowledged == list(range(next_step, next_step + len(acknowledged)))
        for step in acknowledged:
            steps |= dict.fromkeys(users_of(step, USERS_AT_ONCE), step)
        last = next_step + len(acknowledged)  # under way, or done and not yet said
        if not (path / "CURRENT").exists():
            assert not acknowledged
            continue
        with open_store(str(path)) as store:
            found = step_of(store)
            if found != steps:
                steps |= dict.fromkeys(users_of(last, USERS_AT_ONCE), last)
                num_unsaid += 1
            assert found == steps
            assert sum(info.num_users for info in store.versions()) == len(found)
        next_step, num_acknowledged = last + 1, num_acknowledged + len(acknowledged)
    return num_acknowledged, num_unsaid


def check_kills(path: Path, num_kills: int, seed: int) -> None:
    num_acknowledged, num_unsaid = kill_writers(path, num_kills, seed)
    print(f"{num_kills} kills, {num_acknowledged} commits acknowledged, {num_unsaid} done and not yet acknowledged")
    assert num_acknowledged >= num_kills / 2
    with open_store(str(path)) as store:  # and it goes on as if nothing had been
        store.begin_version(VERSION, 1, 16, NUM_USERS)
        store.complete_version(VERSION)
        store.publish(VERSION, force=True)
        assert store.published() == VERSION
        assert store.drop_version("another-version0") == 0


def test_a_writer_killed_twenty_times(tmp_path):
    check_kills(tmp_path / "store", 20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_writer_killed_three_hundred_times(tmp_path):
    check_kills(tmp_path / "store", 300, seed=2)
