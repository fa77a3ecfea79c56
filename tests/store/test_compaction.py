"""Compaction of the embedded engine: no old byte is left, and whoever is killed or at work meanwhile loses nothing."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.contracts.store import V1, V2, fill, numbered, tokens_of, writes
from tests.store.workers import NUM_USERS, start, step_of, users_of
from vista.errors import StoreError
from vista.store import lmdb_store
from vista.store.contract import open_store
from vista.store.generations import Generations
from vista.store.lmdb_store import LmdbStore


def files_with(path: Path, content: bytes) -> list[str]:
    """The files below a folder that hold these bytes, whatever they are."""
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and content in f.read_bytes())


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


@pytest.mark.parametrize("num_bytes", [40, 900, 50_000], ids=["small", "a quarter of a page", "many pages"])
def test_no_byte_of_what_was_deleted_or_replaced_is_left(tmp_path, num_bytes):
    """Records of every size: LMDB keeps the bytes of small ones in pages that others still use."""
    secret = {name: np.random.default_rng(n).bytes(num_bytes) for n, name in enumerate(("gone", "old", "dropped"))}
    others = np.random.default_rng(9).bytes(num_bytes)
    with open_store(str(tmp_path)) as store:
        fill(store, V1, *numbered(50))
        fill(store, V2, b"i:000007")
        for user in numbered(50):
            store.commit([("state", user, others)], V1)
        store.commit([("state", b"i:000007", secret["gone"]), ("state", b"i:000008", secret["old"])], V1)
        store.commit([("state", b"i:000007", secret["dropped"])], V2)
        store.delete(b"i:000007", V1)
        store.commit([("state", b"i:000008", others)], V1)
        store.drop_version(V2)
        assert all(files_with(tmp_path, content) for content in secret.values()), "nothing to compact away"
        store.compact()
        for name, content in secret.items():
            assert files_with(tmp_path, content[:30]) == files_with(tmp_path, content[-30:]) == [], name
        assert files_with(tmp_path, others) == ["2/data.mdb"]
        assert store.get_many("state", [b"i:000007", b"i:000008"], V1) == [None, others]
    assert names(tmp_path) == ["2", "CURRENT"]


def test_it_says_what_it_freed(tmp_path):
    with LmdbStore(str(tmp_path)) as store:
        fill(store, V1, b"a")
        store.commit([("state", b"b", b"x" * 3_000_000)], V1)
        store.delete(b"b")
        assert 3_000_000 <= store.compact() < 3_200_000
        assert store.compact() == 0


def test_records_larger_than_what_is_copied_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_store, "COPY_BYTES", 10_000)
    monkeypatch.setattr(lmdb_store, "FIRST_MAP_BYTES", 1 << 16)
    with LmdbStore(str(tmp_path)) as store:
        fill(store, V1, *numbered(300))
        store.commit([("state", user, user * 5000) for user in numbered(20)], V1)
        store.compact()
        assert store.get_many("state", numbered(20), V1) == [user * 5000 for user in numbered(20)]
        assert store.get_many("tokens", numbered(300), V1) == [tokens_of(V1, user) for user in numbered(300)]


def test_a_store_that_others_have_open_moves_under_them(tmp_path):
    """Three processes write and read on, and a fourth compacts again and again: no acknowledged write is lost."""
    writer = start("write", tmp_path, 1, NUM_USERS)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "1\n"
    compactor = start("compact", tmp_path)
    assert compactor.stdout is not None
    assert compactor.stdout.readline() == "0\n"
    readers = [start("read", tmp_path, 1.5) for _ in range(2)]
    num_seen = [int(reader.communicate(timeout=60)[0]) for reader in readers]
    writer.kill()
    last = int(writer.communicate()[0].split("\n")[-2])
    compactor.kill()
    num_compactions = int(compactor.communicate()[0].split("\n")[-2])
    assert [reader.returncode for reader in readers] == [0, 0]
    assert min(num_seen) > 3, "a reader never saw the writer at work"
    assert num_compactions > 3, "it was never compacted meanwhile"
    with open_store(str(tmp_path)) as store:
        steps = set(step_of(store).values())
        assert steps in ({last}, {last + 1})  # the last one may have been done and not yet said
    assert len(names(tmp_path)) == 2


class Killed(BaseException):
    """Stands for the end of a process: nothing after it runs."""


def stop_at(monkeypatch: pytest.MonkeyPatch, place: object, name: str, is_before: bool) -> None:
    """Let a function, and all that would clean up behind it, never come to its end."""
    do = getattr(place, name)

    def stop(*arguments: object, **options: object) -> None:
        if not is_before:
            do(*arguments, **options)
        raise Killed

    monkeypatch.setattr(place, name, stop)


def test_a_reader_that_opened_before_reads_on_after_and_one_opens_what_a_killed_compaction_left(tmp_path, monkeypatch):
    """The store has moved, and the compacting process was killed before it said so in the pointer."""
    with open_store(str(tmp_path)) as store:
        fill(store, V1, b"a")
        stop_at(monkeypatch, Generations, "tidy", is_before=True)
        with pytest.raises(Killed):
            store.compact()
        monkeypatch.undo()
    assert names(tmp_path) == ["1", "2", "CURRENT"]
    assert (tmp_path / "CURRENT").read_text() == "1\n"
    with open_store(str(tmp_path), read_only=True) as reader:  # follows, and leaves all as it is
        assert reader.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
    assert names(tmp_path) == ["1", "2", "CURRENT"]
    with open_store(str(tmp_path)) as store:
        assert names(tmp_path) == ["2", "CURRENT"]
        store.commit(writes(b"b"), V1)
    with open_store(str(tmp_path), read_only=True) as reader:
        assert reader.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), b"tokens of b "]


@pytest.mark.parametrize("left", ["2", "1.removed", "7.removed"])
def test_what_a_killed_compaction_left_is_removed_by_the_next_writer(tmp_path, left):
    with open_store(str(tmp_path)) as store:
        fill(store, V1, b"a")
    shutil.copytree(tmp_path / "1", tmp_path / left)
    open_store(str(tmp_path), read_only=True).close()
    assert names(tmp_path) == sorted(["1", "CURRENT", left])
    with open_store(str(tmp_path)) as store:
        assert names(tmp_path) == ["1", "CURRENT"]
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with open_store(str(tmp_path)) as store:
        fill(store, V1, b"a")
        monkeypatch.setattr(lmdb_store, "sync", full)
        with pytest.raises(StoreError, match=r"cannot be compacted.*No space left.*free some"):
            store.compact()
        assert names(tmp_path) == ["1", "CURRENT"]
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
        monkeypatch.undo()
        store.compact()
        assert names(tmp_path) == ["2", "CURRENT"]


def kill_compactions(path: Path, num_kills: int, seed: int) -> tuple[int, int]:
    """Kill compacting processes while another one writes; kills that left files behind, and generations in the end."""
    moments = random.Random(seed)
    writer = start("write", path, 1, 20)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "1\n"
    num_left = 0
    for _ in range(num_kills):
        compactor = start("compact", path)
        assert compactor.stdout is not None
        compactor.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        compactor.kill()
        compactor.communicate()
        num_left += len(names(path)) > 2
    writer.kill()
    last = 1 + len(writer.communicate()[0].split("\n")[:-1])
    steps: dict[int, int] = {}
    for step in range(1, last + 1):
        steps |= dict.fromkeys(users_of(step, 20), step)
    with open_store(str(path)) as store:
        found = step_of(store)
        unsaid = steps | dict.fromkeys(users_of(last + 1, 20), last + 1)
        assert found in (steps, unsaid), "a write that was acknowledged is lost"
        assert sum(info.num_users for info in store.versions()) == len(found)
    number = int((path / "CURRENT").read_text())
    assert names(path) == [str(number), "CURRENT"]
    return num_left, number


def test_compactions_killed_beside_a_writer(tmp_path):
    num_left, number = kill_compactions(tmp_path / "store", 12, seed=3)
    print(f"{num_left} of 12 kills left files; generation {number}")
    assert number > 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compactions_killed_two_hundred_times_beside_a_writer(tmp_path):
    num_left, _ = kill_compactions(tmp_path / "store", 200, seed=4)
    assert num_left > 20, "hardly a kill met a compaction at work"
