"""The embedded engine: the contract of a store, a map that grows, processes side by side, and what can go wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from tests.contracts.store import V1, StoreContract, fill, numbered, tokens_of, writes
from tests.store.workers import NUM_USERS, VERSION, start, step_of
from vista.errors import StoreError
from vista.store.contract import open_store
from vista.store.lmdb_store import LmdbStore, record_key

NOBODY = 65534  # a user id without rights


class TestLmdbContract(StoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str:
        return f"lmdb:{tmp_path / 'store'}"


class TestLmdbContractInATinyMap(TestLmdbContract):
    """The same while the map grows every few commits."""

    @pytest.fixture(autouse=True)
    def tiny_map(self, monkeypatch) -> None:
        monkeypatch.setattr("vista.store.lmdb_store.FIRST_MAP_BYTES", 1 << 16)


def data_file(path: Path) -> Path:
    """The database file of a store that was never compacted."""
    return path / "1" / "data.mdb"


def map_bytes(store: LmdbStore) -> int:
    return store._env.info()["map_size"]


# -- the map


def test_the_map_grows_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("vista.store.lmdb_store.FIRST_MAP_BYTES", 1 << 16)
    users = numbered(40)
    with LmdbStore(str(tmp_path)) as store:
        before = map_bytes(store)
        fill(store, V1, *users)
        for user in users:
            store.commit([("state", user, user * 10_000)], V1)
        assert map_bytes(store) >= 16 * before
        assert store.get_many("state", users, V1) == [user * 10_000 for user in users]
        store.commit([("state", b"one", b"x" * 20_000_000)], V1)  # several times the map in one go
        assert store.get_many("state", [b"one"], V1) == [b"x" * 20_000_000]
        assert store.get_many("tokens", users, V1) == [tokens_of(V1, user) for user in users]


def test_a_store_larger_than_the_first_map_is_opened(tmp_path, monkeypatch):
    with LmdbStore(str(tmp_path)) as store:
        fill(store, V1)
        store.commit([("state", b"a", b"x" * 10_000_000)], V1)
    monkeypatch.setattr("vista.store.lmdb_store.FIRST_MAP_BYTES", 1 << 16)
    for read_only in (True, False):
        with open_store(str(tmp_path), read_only) as store:
            assert store.get_many("state", [b"a"], V1) == [b"x" * 10_000_000]


def test_an_environment_of_another_process_has_grown(tmp_path, monkeypatch):
    """A store that was opened small reads and writes what a later, larger one has written."""
    with LmdbStore(str(tmp_path)) as store:
        fill(store, V1)
    monkeypatch.setattr("vista.store.lmdb_store.FIRST_MAP_BYTES", 1 << 16)
    with LmdbStore(str(tmp_path)) as store:
        before = map_bytes(store)
        writer = start("write", tmp_path, 400, NUM_USERS)  # megabytes at once
        assert writer.stdout is not None
        assert writer.stdout.readline() == "400\n"
        writer.kill()
        writer.communicate()
        assert data_file(tmp_path).stat().st_size > before
        assert set(step_of(store).values()) <= set(range(400, 500))
        store.commit(writes(b"a"), V1)
        assert map_bytes(store) > before


# -- processes


def test_readers_in_other_processes_see_one_moment_each_while_a_writer_is_at_work(tmp_path):
    """The writer also outgrows every map the readers have opened."""
    writer = start("write", tmp_path, 1, NUM_USERS)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "1\n"
    size = data_file(tmp_path).stat().st_size
    readers = [start("read", tmp_path, 1.5) for _ in range(3)]
    num_seen = [int(reader.communicate(timeout=60)[0]) for reader in readers]
    writer.kill()
    writer.communicate()
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert min(num_seen) > 3, "a reader never saw the writer at work"
    assert data_file(tmp_path).stat().st_size > 4 * size


def test_a_killed_reader_leaves_no_trace(tmp_path):
    """Its slot would keep the writer from using freed space again."""
    writer = start("write", tmp_path, 1, NUM_USERS)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "1\n"
    writer.kill()
    writer.communicate()
    reader = start("read", tmp_path, 600)
    with LmdbStore(str(tmp_path)) as store:
        while store._env.info()["num_readers"] < 2:  # the environment's own slot comes with its first reading
            store.published()
            assert reader.poll() is None
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    with LmdbStore(str(tmp_path)) as store:
        store.published()
        assert str(reader.pid) not in store._env.readers()


# -- what can go wrong


def test_no_store_is_there(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere: there is no store; run: vista summarize"):
        open_store(str(tmp_path / "nowhere"), read_only=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("url", ["lmbd:store", "s3:bucket", "redos://localhost:6379"])
def test_an_unknown_scheme(url):
    with pytest.raises(StoreError, match=rf"unknown scheme '{url.split(':')[0]}'; use lmdb:PATH or a path"):
        open_store(url)


def test_a_path_is_a_store_with_and_without_its_scheme(tmp_path):
    with open_store(f"lmdb:{tmp_path / 'a'}") as store:
        fill(store, V1)
    with open_store(str(tmp_path / "a")) as store:
        assert [info.version for info in store.versions()] == [V1]
    odd = tmp_path / "with:colon"
    with open_store(str(odd)) as store:
        fill(store, V1)
    assert data_file(odd).exists()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_in_the_way(tmp_path, read_only):
    (tmp_path / "store").write_text("a file")
    reason = "there is no store" if read_only else "cannot be opened"
    with pytest.raises(StoreError, match=reason):
        open_store(str(tmp_path / "store"), read_only)


@pytest.mark.parametrize("content", [b"", b"no store at all", bytes(8192)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_database(tmp_path, content):
    data_file(tmp_path).parent.mkdir()
    data_file(tmp_path).write_bytes(content)
    (tmp_path / "CURRENT").write_text("1\n")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(str(tmp_path), read_only=True)
    if content:
        with pytest.raises(StoreError, match="cannot be opened"):
            open_store(str(tmp_path))
        assert data_file(tmp_path).read_bytes() == content


def test_a_database_of_somebody_else(tmp_path):
    """It has none of our tables; after the refusal it can be opened as what it is."""
    folder = tmp_path / "1"
    folder.mkdir()
    with lmdb.open(str(folder)) as other, other.begin(write=True) as transaction:
        transaction.put(b"theirs", b"value")
    (tmp_path / "CURRENT").write_text("1\n")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(str(tmp_path), read_only=True)
    with lmdb.open(str(folder)) as other, other.begin() as transaction:
        assert transaction.get(b"theirs") == b"value"


@pytest.mark.parametrize("read_only", [True, False])
def test_a_database_without_generations(tmp_path, read_only):
    with lmdb.open(str(tmp_path)) as other, other.begin(write=True) as transaction:
        transaction.put(b"theirs", b"value")
    with pytest.raises(StoreError, match=r"a database without generations.*move it away"):
        open_store(str(tmp_path), read_only)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.mdb", "lock.mdb"]


@pytest.mark.parametrize("content", ["", "one\n", "-1\n"])
def test_a_pointer_to_nowhere(tmp_path, content):
    with open_store(str(tmp_path)) as store:
        fill(store, V1, b"a")
    (tmp_path / "CURRENT").write_text(content)
    for read_only in (True, False):
        with pytest.raises(StoreError, match="is no number of a generation"):
            open_store(str(tmp_path), read_only)


def test_one_store_twice_in_one_process(tmp_path):
    with open_store(str(tmp_path)) as store:
        fill(store, V1, b"a")
        with pytest.raises(StoreError, match=r"cannot be opened.*already open"):
            open_store(str(tmp_path), read_only=True)
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom folders can be closed to; root passes everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path) -> Iterator[Path]:
    """A folder that every user reaches."""
    closed = [path for path in (tmp_path, *tmp_path.parents) if not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in closed}
    for path in closed:
        path.chmod(0o755)
    yield tmp_path
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_folder_without_permission(open_folder):
    """None to make a store in it, and none to write the one that is there; a reader takes a slot, so it writes too."""
    place = open_folder / "store"
    with open_store(str(place)) as store:
        fill(store, V1, b"a")
    closed = (open_folder, place, place / "CURRENT", place / "1", data_file(place), place / "1" / "lock.mdb")
    modes = {path: path.stat().st_mode for path in closed}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with without_rights():
            for path, read_only in [(open_folder / "new", False), (place, False), (place, True)]:
                with pytest.raises(
                    StoreError, match=rf"{path}: cannot be opened.*ermission denied.*check .* its owner"
                ):
                    open_store(str(path), read_only)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    with open_store(str(place)) as store:
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(tmp_path):
    """A limit on the size of files stands for the disk: the system's refusal comes at the same place."""
    filler = start("fill", tmp_path / "store", 1_000_000)
    said, _ = filler.communicate(timeout=60)
    assert filler.returncode == 0
    step, message = said.split(" ", 1)
    assert int(step) > 3
    assert "cannot be written" in message
    assert "nothing of this write was kept. Free space" in message
    with open_store(str(tmp_path / "store")) as store:
        assert step_of(store) == dict.fromkeys(range(NUM_USERS), int(step))
        store.commit(writes(b"a"), VERSION)  # with space again, it goes on
        assert store.get_many("tokens", [b"a"], VERSION) == [b"tokens of a "]


def test_a_key_begins_with_version_and_kind():
    assert record_key(V1, "tokens", b"i:7") == V1.encode() + b"\0i:7"
    assert record_key(V1, "border", b"") == V1.encode() + b"\2"
