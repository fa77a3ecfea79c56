"""Bulk runs: plan, users that fail, workers that die, interruptions; whatever happens, the same bytes in the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vista
from tests.jobs.bulk_worker import ME, USERS_AT_ONCE, DyingFolder
from tests.training.worlds import SMALL, write_world
from vista.checkpoint import Run, load_run
from vista.cli.main import app
from vista.config import resolve
from vista.data.histories import PreparedData
from vista.errors import ConfigError, JobError
from vista.jobs import blocks, fold
from vista.jobs.blocks import plan
from vista.jobs.local import LocalEngine
from vista.jobs.summarize import Engine, SummarizeReport, is_beyond, make_engine, summarize
from vista.store import versions
from vista.store.contract import open_store
from vista.store.record import Record, encode, user_key
from vista.training.loop import train

NUM_USERS = 30
FIRST_ID = 100  # of the world's users
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find children")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data", NUM_USERS)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Run:
    settings = resolve("tiny", overrides=SMALL | {"train.max_steps": 5})
    return load_run(train(data, tmp_path_factory.mktemp("run") / "run", settings, quiet=True))


def bulk(run: Run, data: PreparedData, path: Path, engine: Engine | None = None, **options: bool) -> SummarizeReport:
    with open_store(str(path)) as store:
        return summarize(run, data, store, quiet=True, engine=engine, **options)


def content(path: Path, version: str) -> dict[tuple[str, bytes], bytes]:
    """All records of a store."""
    with open_store(str(path), read_only=True) as store:
        return {(kind, key): blob for kind in ("tokens", "state") for key, blob in store.scan(kind, version)}


def change(data: PreparedData, column: str, user: int, event: int, value: int) -> int:
    """Overwrite one number of a history; the one that was there."""
    path = data.folder / "events" / f"{column}.npy"
    values = np.load(path)
    place = int(data.histories.offsets[user]) + event
    before, values[place] = int(values[place]), value
    np.save(path, values)
    return before


# -- the plan


def random_lengths(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(3, 2, 500).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_has_every_wanted_user_once_within_limits_and_the_longest_first(monkeypatch, seed):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 20)
    monkeypatch.setattr(blocks, "EVENTS_AT_ONCE", 300)
    lengths, ids = random_lengths(seed), np.arange(500) * 7
    is_wanted = np.random.default_rng(seed).random(500) < 0.7
    planned = plan(lengths, ids, is_wanted)
    users = np.concatenate([block.users for block in planned])
    assert sorted(users) == np.flatnonzero(is_wanted).tolist()
    for block in planned:
        assert len(block.users) <= 20
        assert block.num_events <= 300 or len(block.users) == 1
        assert block.user_ids.tolist() == (block.users * 7).tolist()
    longest = [int(block.lengths[0]) for block in planned]
    assert longest == sorted(longest, reverse=True)
    assert len(planned) < 0.5 * is_wanted.sum(), "blocks are filled"


def test_going_on_after_an_interruption_folds_the_very_blocks_that_are_missing(monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 20)
    monkeypatch.setattr(blocks, "EVENTS_AT_ONCE", 300)  # a block that ends here would have room for who follows a gap
    lengths, ids, is_wanted = random_lengths(0), np.arange(500), np.ones(500, bool)
    whole = plan(lengths, ids, is_wanted)
    several = next(number for number, block in enumerate(whole) if len(block.users) > 1)
    gap = slice(several + 1, len(whole) - 3)
    for block in whole[gap]:
        is_wanted[block.users] = False
    rest = plan(lengths, ids, is_wanted)
    assert [b.users.tolist() for b in rest] == [b.users.tolist() for b in whole[: gap.start] + whole[gap.stop :]]


def test_a_few_wanted_users_here_and_there_fill_blocks_together(monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 20)
    lengths, is_wanted = np.full(500, 10), np.arange(500) % 25 == 0
    assert [len(block.users) for block in plan(lengths, np.arange(500), is_wanted)] == [20]


def test_no_users_are_no_blocks():
    assert plan(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool)) == []


# -- who is taken up


def write_tokens(path: Path, run: Run, user: int, num_events: int, as_of_us: int) -> None:
    record = Record("tokens", run.version, user_key(user), as_of_us, num_events, {"tokens": np.ones((4, 16), "f4")})
    with open_store(str(path)) as store:
        store.commit([("tokens", record.user_key, encode(record))], run.version)


def test_the_watermark_is_how_many_events_and_up_to_when(run, data, tmp_path):
    bulk(run, data, tmp_path / "store")
    last_us = data.histories.timestamp_us[data.histories.offsets[1:] - 1]
    write_tokens(tmp_path / "store", run, FIRST_ID + 3, 59, last_us[3])  # an event less
    write_tokens(tmp_path / "store", run, FIRST_ID + 4, 60, last_us[4] - 1)  # as many, but not the newest
    write_tokens(tmp_path / "store", run, FIRST_ID + 5, 61, last_us[5] + 1)  # ahead, as a stream makes it
    with open_store(str(tmp_path / "store")) as store:
        store.commit([("tokens", user_key(FIRST_ID + 6), b"not a record")], run.version)
        assert np.flatnonzero(is_beyond(data, store, run.version, quiet=True)).tolist() == [3, 4, 6]
    ahead = content(tmp_path / "store", run.version)["tokens", user_key(FIRST_ID + 5)]
    report = bulk(run, data, tmp_path / "store")
    assert (report.num_users, report.num_current, report.num_events) == (3, 27, 180)
    assert content(tmp_path / "store", run.version)["tokens", user_key(FIRST_ID + 5)] == ahead
    assert bulk(run, data, tmp_path / "store", all_users=True).num_users == 30
    assert content(tmp_path / "store", run.version)["tokens", user_key(FIRST_ID + 5)] != ahead


# -- users that fail


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("item", 30_000, r"event 11 of 60 has item index 30000, but it is between 1 and \d+; prepare the data again"),
        ("item", 0, "event 11 of 60 has item index 0, but"),
        ("item", -1, "event 11 of 60 has item index -1, but"),
        ("action", 4, "event 11 of 60 has action 4, but it is between 0 and 3"),
        ("timestamp_us", 5, "event 11 of 60 has timestamp 5, but it is not before that of the event before"),
    ],
)
def test_a_broken_history_fails_alone_and_is_taken_up_when_mended(run, tmp_path, monkeypatch, column, value, reason):
    data = write_world(tmp_path / "data", NUM_USERS)
    before = change(data, column, 7, 10, value)
    report = bulk(run, PreparedData.open(data.folder), tmp_path / "store")
    (failed,) = report.failed
    assert failed.user_id == FIRST_ID + 7
    assert re.match(reason, failed.reason), failed.reason
    assert (report.num_users, report.num_events, report.is_complete, report.is_published) == (29, 29 * 60, False, False)
    assert ("tokens", user_key(FIRST_ID + 7)) not in content(tmp_path / "store", run.version)
    with monkeypatch.context() as patch:  # the same with users enough
        patch.setattr(versions, "LEAST_COVERAGE", 0.9)
        report = bulk(run, PreparedData.open(data.folder), tmp_path / "store")
        assert (report.num_users, len(report.failed), report.is_published) == (0, 1, True)
    change(data, column, 7, 10, before)
    report = bulk(run, PreparedData.open(data.folder), tmp_path / "store")
    assert (report.num_users, report.num_current, report.is_published) == (1, 29, True)
    assert not report.failed


def test_an_exception_in_the_fold_costs_the_block_one_user(run, data, tmp_path, monkeypatch):
    summarize_users, calls = fold.summarize_users, []

    def fails_with_user_7(model, histories, users, *others):
        calls.append(len(users))
        if 7 in users:
            raise IndexError("no such\n row")
        return summarize_users(model, histories, users, *others)

    monkeypatch.setattr(fold, "summarize_users", fails_with_user_7)
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 10)
    report = bulk(run, data, tmp_path / "store")
    assert [(f.user_id, f.reason, f.num_events) for f in report.failed] == [(107, "IndexError: no such row", 60)]
    assert report.num_users == 29
    assert calls == [10] + [1] * 10 + [10, 10]
    monkeypatch.undo()
    bulk(run, data, tmp_path / "alone")
    one, other = content(tmp_path / "store", run.version), content(tmp_path / "alone", run.version)
    assert len(one) == 58
    assert one.keys() < other.keys()


def test_the_command_names_who_failed_and_how_to_go_on(run, tmp_path, monkeypatch):
    data = write_world(tmp_path / "data", NUM_USERS)
    for user in range(12):
        change(data, "item", user, 0, -1)
    words = ["summarize", run.folder, "--data", data.folder, "--store", tmp_path / "store"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 3
    assert f"summarized 18 users (1,080 events), 0 were current; not published: version {run.version}" in result.stdout
    lines = result.stderr.splitlines()
    assert sum(line.startswith("failed: user 1") for line in lines) == 10
    assert "failed: 2 more" in lines
    assert "12 of 30 users failed; mend what is said above, then run the same command again" in lines[-2]
    assert f"too many for version {run.version} to be published" in lines[-1]
    assert "users 18/30" in result.stderr
    assert "failed 12" in result.stderr
    monkeypatch.setattr(versions, "LEAST_COVERAGE", 0.5)
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 3
    assert f"0 users (0 events), 18 were current; published version {run.version}" in result.stdout
    assert "to be published" not in result.stderr


# -- workers


def test_many_workers_give_the_bytes_of_one_though_one_is_killed_and_a_user_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 4)
    data = write_world(tmp_path / "data", NUM_USERS)
    change(data, "item", 3, 10, -1)
    data = PreparedData.open(data.folder)
    one = bulk(run, data, tmp_path / "one", LocalEngine(1))
    engine = LocalEngine(2, (*ME, "die-once", str(tmp_path / "has died"), "12"))
    two = bulk(run, data, tmp_path / "two", engine)
    assert (tmp_path / "has died").exists(), "no worker was killed"
    assert two == one
    assert len(one.failed) == 1
    assert one.num_users == 29
    assert content(tmp_path / "two", run.version) == content(tmp_path / "one", run.version)


@pytest.mark.slow
def test_a_user_that_kills_every_worker_fails_alone(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 10)
    report = bulk(run, data, tmp_path / "store", LocalEngine(2, (*ME, "die", "12")))
    (failed,) = report.failed
    assert failed.user_id == FIRST_ID + 12
    assert "its worker ended with status -9" in failed.reason
    assert report.num_users == 29


def test_workers_that_do_not_start_are_an_error(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 10)
    command = (sys.executable, "-c", "import sys; sys.exit(7)")
    with pytest.raises(JobError, match=r"3 workers in a row ended before they were ready .* status 7"):
        bulk(run, data, tmp_path / "store", LocalEngine(2, command))


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_an_error(workers):
    with pytest.raises(ConfigError, match=f"workers = {workers}: at least 1"):
        LocalEngine(workers)


def test_little_work_starts_no_worker(run, data, tmp_path):
    assert bulk(run, data, tmp_path / "store", LocalEngine(None, ("no-such-program",))).num_users == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "lokal"}, "engine 'lokal'; did you mean 'local'?"),
        ({"ray_address": "auto"}, "add --engine ray"),
        ({"workers": 0}, "workers = 0: at least 1"),
        ({"codec": "int7"}, "codec 'int7'; did you mean 'int8'?"),
    ],
)
def test_bad_input_leaves_no_store(run, data, tmp_path, options, message):
    with pytest.raises(ConfigError) as caught:
        vista.summarize(run.folder, data.folder, str(tmp_path / "store"), quiet=True, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "store").exists()


# -- interruptions


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "too late"
        time.sleep(0.02)


def num_stored(path: Path) -> int:
    if not (path / "CURRENT").exists():
        return 0
    with open_store(str(path), read_only=True) as store:
        return sum(info.num_users for info in store.versions())


def interrupted(run: Run, data: PreparedData, store: Path, stop: Callable[[int], None]) -> tuple[int, str]:
    """Start the command with two workers, stop it when something new is stored, wait for its workers to be gone.

    Its status and what it said on stderr.
    """
    words = ["summarize", run.folder, "--data", data.folder, "--store", store, "--workers", 2]
    before = num_stored(store)
    command = [*ME, "vista", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until(lambda: num_stored(store) > before)
        workers = children(process.pid)
        assert len(workers) == 2
        stop(process.pid)
        said = process.communicate(timeout=60)[1]
    until(lambda: not any(map(is_running, workers)), timeout_s=5)
    return process.returncode, said


def end_and_compare(run: Run, data: PreparedData, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on in this process; in the end every byte is that of a run that was never interrupted."""
    num_before = num_stored(store)
    assert 0 < num_before < NUM_USERS
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", USERS_AT_ONCE)
    report = bulk(run, data, store)
    assert (report.num_current, report.num_users) == (num_before, NUM_USERS - num_before)
    assert report.is_published
    bulk(run, data, store.parent / "at once")
    assert content(store, run.version) == content(store.parent / "at once", run.version)


@needs_proc
def test_after_kill_no_process_is_left_and_the_next_run_ends_with_the_same_bytes(run, data, tmp_path, monkeypatch):
    status, said = interrupted(run, data, tmp_path / "store", lambda pid: os.kill(pid, signal.SIGKILL))
    assert (status, said.count("Traceback")) == (-9, 0)
    end_and_compare(run, data, tmp_path / "store", monkeypatch)


@needs_proc
@pytest.mark.slow
def test_after_ctrl_c_no_process_is_left_and_the_next_run_ends_with_the_same_bytes(run, data, tmp_path, monkeypatch):
    status, said = interrupted(run, data, tmp_path / "store", lambda pid: os.killpg(pid, signal.SIGINT))
    assert (status, said.count("Traceback")) == (130, 0)
    assert "users were summarized and are in the store; run the same command again" in said.splitlines()[-1]
    end_and_compare(run, data, tmp_path / "store", monkeypatch)


STUCK = """
import sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-1]))
connection.send("ready")
time.sleep(600)
"""


@needs_proc
def test_ctrl_c_ends_workers_in_the_middle_of_a_block(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 10)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before, mine = set(children(os.getpid())), set()

    def interrupt() -> None:
        until(lambda: len(set(children(os.getpid())) - before) == 2)
        mine.update(set(children(os.getpid())) - before)
        time.sleep(0.5)  # the second one is there before the engine knows of it
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt, match="0 users were summarized"):
            bulk(run, data, tmp_path / "store", LocalEngine(2, (sys.executable, "-c", STUCK)))
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert len(mine) == 2
    assert not any(map(is_running, mine))


# -- Ray


def on_two_workers(run: Run, data: PreparedData, path: Path) -> SummarizeReport:
    pytest.importorskip("ray", reason="needs the extra: pip install 'vista-recsys[ray]'")
    from vista.jobs.on_ray import RayEngine

    return bulk(run, data, path, RayEngine("local", 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_on_ray_nothing_is_lost_or_doubled_when_a_worker_is_killed(run, data, tmp_path, monkeypatch):
    from vista.jobs import on_ray

    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(on_ray, "Folder", DyingFolder)
    monkeypatch.setenv("VISTA_TEST_DIED", str(tmp_path / "has died"))
    report = on_two_workers(run, data, tmp_path / "store")
    assert (tmp_path / "has died").exists(), "no worker was killed"
    assert (report.num_users, report.num_events, report.failed) == (NUM_USERS, NUM_USERS * 60, ())
    assert bulk(run, data, tmp_path / "alone") == report
    assert content(tmp_path / "store", run.version) == content(tmp_path / "alone", run.version)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_ray_a_user_that_kills_every_worker_fails_alone(run, data, tmp_path, monkeypatch):
    from vista.jobs import on_ray

    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 10)
    monkeypatch.setattr(on_ray, "Folder", DyingFolder)
    report = on_two_workers(run, data, tmp_path / "store")
    (failed,) = report.failed
    assert failed.user_id == FIRST_ID + 12
    assert "its Ray actor died" in failed.reason
    assert report.num_users == 29


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "nonsense"])
def test_an_address_without_ray_is_an_error_at_once(monkeypatch, address):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))  # without waiting for the real one
    monkeypatch.setitem(sys.modules, "ray.data", types.ModuleType("ray.data"))
    with pytest.raises(JobError, match=f"ray_address '{address}': .*; give HOST:PORT"):
        make_engine("ray", None, address)


@pytest.mark.parametrize(
    ("workers", "error", "message"),
    [(0, ConfigError, "workers = 0"), (None, JobError, r"pip install 'vista-recsys\[ray\]'")],
)
def test_ray_is_an_extra(monkeypatch, workers, error, message):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(error, match=message):
        make_engine("ray", workers)
