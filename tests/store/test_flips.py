"""Reader processes beside one that publishes and rolls back all the time: each reading is of one version, whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.servers import Server
from tests.store.workers import NUM_USERS, start
from vista.store.contract import open_store
from vista.store.record import user_key

VERSIONS = ("spring-version--", "summer-version--")
DURATION_S = 1.5


@pytest.fixture(params=["lmdb", "redis"])
def url(request, tmp_path) -> Iterator[str]:
    if request.param == "lmdb":
        yield f"lmdb:{tmp_path / 'store'}"
        return
    server = Server(tmp_path / "redis")
    yield server.url
    server.kill()


def test_readers_in_other_processes_never_see_a_mix(url):
    keys = [user_key(user) for user in range(NUM_USERS)]
    with open_store(url) as store:
        for version in VERSIONS:
            store.begin_version(version, 1, 16, NUM_USERS)
            store.commit([("tokens", key, b"%s of %s" % (version.encode(), key)) for key in keys], version)
            store.complete_version(version)
            store.publish(version)
        readers = [start("follow", url, DURATION_S) for _ in range(3)]
        num_flips = 0
        while any(reader.poll() is None for reader in readers):
            store.rollback()
            store.publish(VERSIONS[num_flips % 2])
            num_flips += 2
        num_changes = [int(reader.communicate()[0] or 0) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert min(num_changes) > 3, "a reader never saw a flip"
