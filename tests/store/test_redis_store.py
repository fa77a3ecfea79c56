"""The shared engine: the contract of a store on a real server and on a cluster of two, and what can go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.contracts.store import V1, V2, StoreContract, fill, numbered, tokens_of, writes
from tests.store.servers import Server, free_port
from vista.errors import StoreError, VistaWarning
from vista.store.contract import SummaryStore, open_store, shown
from vista.store.redis_store import BUCKETS, FACTS, RedisStore, bucket_of

BINARY_KEY = b"s:}{\0\xff"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(running) -> Server:
    """A server without anything in it."""
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture
def own_server(tmp_path) -> Iterator[Server]:
    """A server that a test may kill."""
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory) -> Iterator[list[Server]]:
    """Two servers that share the hash slots."""
    buses = [free_port(), free_port()]
    servers = [
        Server(tmp_path_factory.mktemp("cluster"), cluster_enabled="yes", cluster_port=str(bus)) for bus in buses
    ]
    for server, slots in zip(servers, [(0, 8191), (8192, 16383)], strict=True):
        with server.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", *slots)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", 1 + slots[0] // 8192)
    with servers[0].client() as client:
        client.execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port, buses[1])
    for server in servers:
        with server.client() as client:
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.05)
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def cluster(running_cluster) -> list[Server]:
    for server in running_cluster:
        with server.client() as client:
            client.flushall()
    return running_cluster


class TestRedisContract(StoreContract):
    @pytest.fixture
    def url(self, server) -> str:
        return server.url


class TestRedisSocketContract(StoreContract):
    """Over a socket of this machine, in another database."""

    @pytest.fixture
    def url(self, server) -> str:
        return f"unix:{server.socket}?db=3"


class TestClusterContract(StoreContract):
    @pytest.fixture
    def url(self, cluster) -> str:
        return cluster[1].url

    @pytest.mark.skip(reason="a cluster has no moment for several users: docs/store.md")
    def test_a_reader_sees_one_moment(self) -> None: ...


# -- keys


def test_databases_are_stores_of_their_own(server):
    with open_store(server.url) as one, open_store(server.url.replace("/0", "/1")) as other:
        fill(one, V1, b"a")
        assert other.versions() == []
        fill(other, V2, b"a")
        assert [info.version for info in one.versions()] == [V1]


def test_all_keys_are_ours_and_a_dropped_version_leaves_none(server):
    with open_store(server.url) as store, server.client() as client:
        fill(store, V1, *numbered(300), BINARY_KEY)
        keys = client.keys()
        assert all(key.startswith(b"vista:") for key in keys)
        assert len(keys) > 602
        assert store.drop_version(V1) == 602
        assert client.keys() == [FACTS]


@pytest.mark.parametrize("version", [V1, "}" * 16, "{}" * 8])
def test_all_keys_of_a_user_and_version_are_in_one_slot(cluster, version):
    """And users are spread over the cluster."""
    with open_store(cluster[0].url) as store, cluster[0].client() as client:
        fill(store, version, *numbered(200), BINARY_KEY)
        slots = {}
        for server in cluster:
            with server.client() as one:
                for key in set(one.keys()) - {FACTS}:
                    bucket = key[: len(bucket_of(version, b""))]
                    slots.setdefault(bucket, set()).add(client.execute_command("CLUSTER KEYSLOT", key))
                assert one.dbsize() > 100
    assert {len(slots_of) for slots_of in slots.values()} == {1}
    assert len(slots) > BUCKETS / 4


def test_many_records_are_read_at_once(server):
    """One call to the server for a batch, however many records it has."""
    users = numbered(64)
    with open_store(server.url) as store, server.client() as client:
        fill(store, V1, *users)
        client.config_resetstat()
        assert store.get_many("tokens", users, V1) == [tokens_of(V1, user) for user in users]
        calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
    assert calls.get("cmdstat_mget") == 1
    assert "cmdstat_get" not in calls


# -- durability


def test_what_was_acknowledged_survives_a_killed_server(own_server):
    """And a store that was open goes on when the server is there again."""
    with open_store(own_server.url) as store:
        fill(store, V1, b"a")
        store.publish(V1)
        own_server.kill()
        with pytest.raises(StoreError, match=r"cannot be read \(.*\); is the server up"):
            store.get_many("tokens", [b"a"], V1)
        with pytest.raises(StoreError, match=r"cannot be written \(.*all or nothing was kept"):
            store.commit(writes(b"b"), V1)
        own_server.start()
        assert store.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), None]
        assert store.published() == V1
        store.commit(writes(b"b"), V1)
        assert store.versions()[0].num_users == 2


@pytest.mark.parametrize("settings", [{"appendonly": "no"}, {"appendfsync": "everysec"}], ids=str)
def test_a_server_that_may_lose_writes_is_warned_of(tmp_path, settings):
    server = Server(tmp_path / "redis", **settings)
    try:
        with pytest.warns(VistaWarning, match="may lose acknowledged writes .*appendfsync always"):
            open_store(server.url).close()
        with server.client() as client:
            client.set(FACTS, b'{"versions": {}, "published": {}}')
        open_store(server.url, read_only=True).close()  # whoever only reads has nothing to lose
    finally:
        server.kill()


def test_a_full_server_is_said_and_costs_nothing_that_was_there(own_server):
    with open_store(own_server.url) as store, own_server.client() as client:
        fill(store, V1, b"a")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
        with pytest.raises(StoreError, match=r"cannot be written .*memory.*Check the server, its memory and disk"):
            write_ever_more(store)
        (tokens,), (state,) = (store.get_many(kind, [b"b"], V1) for kind in ("tokens", "state"))
        assert tokens is not None
        assert tokens.removeprefix(b"tokens") == state.removeprefix(b"state")
        client.config_set("maxmemory", 0)
        store.commit(writes(b"b"), V1)
        assert store.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), b"tokens of b "]


def test_a_full_disk_is_said_and_costs_nothing_that_was_acknowledged(own_server):
    own_server.kill()
    own_server.start(max_file_bytes=1_000_000)
    with open_store(own_server.url) as store:
        fill(store, V1, b"a")
        with pytest.raises(StoreError, match=r"cannot be written .*Check the server, its memory and disk"):
            write_ever_more(store)
        own_server.kill()
        own_server.start()
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
        (tokens,), (state,) = (store.get_many(kind, [b"b"], V1) for kind in ("tokens", "state"))
        assert tokens is not None
        assert tokens.removeprefix(b"tokens") == state.removeprefix(b"state")
        store.commit(writes(b"c"), V1)


def test_a_user_without_rights_is_said(server):
    """One who may read only: reads, and is refused where it writes."""
    with open_store(server.url) as store, server.client() as client:
        fill(store, V1, b"a")
        client.execute_command("ACL SETUSER reader on >word ~vista:* resetchannels -@all +@read +ping +info")
    url = server.url.replace("//", "//reader:word@")
    with open_store(url, read_only=True) as store:
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
    with pytest.warns(VistaWarning, match="cannot be asked"):
        store = open_store(url)
    with store:
        with pytest.raises(StoreError, match=r"cannot be written .*permission"):
            store.commit(writes(b"a"), V1)
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]


def write_ever_more(store: SummaryStore) -> None:
    for n in range(100):
        store.commit(writes(b"b", mark=b"%d" % n + b"x" * 100_000 * n), V1)


def test_compacting_leaves_nothing_deleted_on_disk(own_server):
    with open_store(own_server.url) as store:
        fill(store, V1, b"stays", b"deleted-user")
        store.commit(writes(b"stays", mark=b"replaced-record" * 1000), V1)
        store.commit(writes(b"stays", mark=b"new"), V1)
        store.delete(b"deleted-user")
        assert found_on_disk(own_server, b"deleted-user", b"replaced-record")
        assert store.compact() > 30_000
        assert not found_on_disk(own_server, b"deleted-user", b"replaced-record")
        own_server.kill()
        own_server.start()
        assert store.get_many("tokens", [b"stays", b"deleted-user"], V1) == [b"tokens of stays new", None]


def found_on_disk(server: Server, *texts: bytes) -> bool:
    files = [path.read_bytes() for path in server.folder.rglob("*") if path.is_file()]
    return any(text in content for text in texts for content in files)


# -- opening


def test_no_server_is_there(own_server):
    own_server.kill()
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:\d+/0: cannot be opened .*Check host, port"):
            open_store(own_server.url, read_only)
    with pytest.raises(StoreError, match=r"nothing: cannot be opened"):
        open_store(f"unix:{own_server.folder}/nothing")


def test_a_password_opens_and_is_never_shown(tmp_path):
    server = Server(tmp_path / "redis", requirepass="secret")
    try:
        with pytest.raises(StoreError, match=r"cannot be opened \(.*uthentication"):
            open_store(server.url)
        with pytest.raises(StoreError, match="cannot be opened") as refused:
            open_store(server.url.replace("//", "//:secret2@"))
        assert "secret2" not in str(refused.value)
        with open_store(server.url.replace("//", "//:secret@")) as store:
            fill(store, V1, b"a")
            store.close()
            with pytest.raises(StoreError, match=r"redis://:\*\*\*@127") as closed:
                store.published()
            assert "secret" not in str(closed.value)
        with open_store(f"unix:{server.socket}?password=secret", read_only=True) as store:
            assert isinstance(store, RedisStore)
            assert store.name.endswith("password=***")
    finally:
        server.kill()


@pytest.mark.parametrize("url", ["redis://u:secret@host/0", "rediss://u:secret@host", "unix:s?password=secret&db=1"])
def test_a_name_has_no_password(url):
    assert shown(url) == url.replace("secret", "***")


@pytest.mark.parametrize("url", ["redis:", "redis:host", "redis://", "redis://host/name", "redis:///0"])
def test_a_url_that_means_something_else_is_refused(url):
    with pytest.raises(StoreError, match=r"not of the form redis://\[user:password@\]host\[:port\]\[/db\]"):
        open_store(url)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(StoreError, match=r"pip install 'vista-recsys\[redis\]'"):
        open_store("redis://localhost")
