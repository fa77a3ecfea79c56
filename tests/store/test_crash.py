"""A writer or a server killed at any moment: what was acknowledged is there, no user half one step, half another."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.servers import Server
from tests.store.workers import NUM_USERS, STORE_ERROR, VERSION, start, step_of, users_of
from vista.store.contract import open_store

USERS_AT_ONCE = 20
Kill = Callable[["subprocess.Popen[str]"], None]


def kill_writer(writer: subprocess.Popen[str]) -> None:
    writer.kill()
    assert writer.wait() == -9, "the writer ended before it was killed"


def check_kills(url: str, num_kills: int, seed: int, kill: Kill = kill_writer, file: Path | None = None) -> None:
    """Kill something under a writer so many times and look each time. file: without it there is no store yet."""
    moments = random.Random(seed)
    steps: dict[int, int] = {}  # of each user, as acknowledged
    next_step, num_acknowledged, num_unsaid = 1, 0, 0
    for number in range(num_kills):
        writer = start("write", url, next_step, USERS_AT_ONCE)
        assert writer.stdout is not None
        said = []
        if number % 5:  # the others are killed while Python starts, or while the store is opened
            said.append(writer.stdout.readline())
        time.sleep(moments.uniform(0, 0.05 if number % 5 else 0.5))
        kill(writer)
        said += writer.stdout.readlines()
        writer.stdout.close()
        acknowledged = [int(line) for line in said if line.endswith("\n")]
        assert acknowledged == list(range(next_step, next_step + len(acknowledged)))
        for step in acknowledged:
            steps |= dict.fromkeys(users_of(step, USERS_AT_ONCE), step)
        last = next_step + len(acknowledged)  # under way, or done and not yet said
        if file is not None and not file.exists():
            assert not acknowledged
            continue
        with open_store(url) as store:
            found = step_of(store)
            if found != steps:
                steps |= dict.fromkeys(users_of(last, USERS_AT_ONCE), last)
                num_unsaid += 1
            assert found == steps
            assert sum(info.num_users for info in store.versions()) == len(found)
        next_step, num_acknowledged = last + 1, num_acknowledged + len(acknowledged)
    print(f"{num_kills} kills, {num_acknowledged} commits acknowledged, {num_unsaid} done and not yet acknowledged")
    assert num_acknowledged >= num_kills / 2
    check_use(url)


def check_use(url: str) -> None:
    """It goes on as if nothing had been."""
    with open_store(url) as store:
        store.begin_version(VERSION, 1, 16, NUM_USERS)
        store.complete_version(VERSION)
        store.publish(VERSION, force=True)
        assert store.published() == VERSION
        assert store.drop_version("another-version0") == 0


def test_a_writer_killed_ten_times(tmp_path):
    check_kills(str(tmp_path / "store"), 10, seed=1, file=tmp_path / "store" / "CURRENT")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_writer_killed_three_hundred_times(tmp_path):
    check_kills(str(tmp_path / "store"), 300, seed=2, file=tmp_path / "store" / "CURRENT")


# -- a server


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


def killing(server: Server) -> Kill:
    """Kill the server under the writer, which then ends with an error, and start it again from its files."""

    def kill(writer: subprocess.Popen[str]) -> None:
        server.kill()
        assert writer.wait() == STORE_ERROR, "the writer did not see a StoreError"
        server.start()

    return kill


def test_a_server_killed_ten_times(server):
    check_kills(server.url, 10, seed=3, kill=killing(server))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_killed_two_hundred_times(server):
    check_kills(server.url, 200, seed=4, kill=killing(server))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_writer_to_a_server_killed_one_hundred_times(server):
    check_kills(server.url, 100, seed=5)
