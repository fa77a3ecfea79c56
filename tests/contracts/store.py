"""The contract of a summary store (``vista.store.contract``), for every engine.

An engine's test module says how to make an empty store, and has all tests:

    class TestMyEngine(StoreContract):
        @pytest.fixture
        def url(self, tmp_path): return f"my:{tmp_path}"
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from vista.errors import StoreError, Superseded
from vista.store.contract import KindStatistics, SummaryStore, Write, collect, open_store
from vista.store.record import KINDS, LONGEST_KEY
from vista.store.versions import VersionInfo

V1, V2, V3 = (f"version-{n}-of-abc" for n in "123")
SHAPE = (8, 4)  # summary tokens and width
MANY = 1000  # records: more than any engine reads in one go


def writes(*users: bytes, mark: bytes = b"") -> list[Write]:
    """Tokens and state of some users; the records say whose they are."""
    return [(kind, user, b"%s of %s %s" % (kind.encode(), user, mark)) for user in users for kind in KINDS[:2]]


def numbered(count: int) -> list[bytes]:
    """Users in order of their keys."""
    return [b"i:%06d" % n for n in range(count)]


def fill(store: SummaryStore, version: str, *users: bytes, complete: bool = True) -> None:
    store.begin_version(version, *SHAPE, expected_users=len(users))
    store.commit(writes(*users, mark=version.encode()), version)
    if complete:
        store.complete_version(version)


def tokens_of(version: str, user: bytes) -> bytes:
    return b"tokens of %s %s" % (user, version.encode())


class StoreContract:
    """What every engine must do."""

    @pytest.fixture
    def url(self) -> str:
        """The URL of an empty store."""
        raise NotImplementedError("an engine's test class has a fixture `url`")

    @pytest.fixture
    def store(self, url: str) -> Iterator[SummaryStore]:
        with open_store(url) as store:
            yield store

    # -- records

    def test_records_come_back_in_the_order_asked(self, store):
        fill(store, V1, b"a", b"b", b"c")
        found = store.get_many("tokens", [b"c", b"nobody", b"a", b"c"], V1)
        assert found == [tokens_of(V1, b"c"), None, tokens_of(V1, b"a"), tokens_of(V1, b"c")]
        assert store.get_many("state", [b"b"], V1) == [b"state of b " + V1.encode()]
        assert store.get_many("border", [b"b"], V1) == [None]
        assert store.get_many("tokens", [], V1) == []

    def test_an_empty_store_is_a_store(self, store):
        assert store.versions() == []
        assert store.published() is None
        assert store.get_many("tokens", [b"a"], V1) == [None]
        assert list(store.scan("tokens", V1)) == []
        assert store.delete(b"a") == 0
        assert store.drop_version(V1) == 0

    def test_versions_never_mix(self, store):
        fill(store, V1, b"a", b"b")
        fill(store, V2, b"a")
        assert store.get_many("tokens", [b"a", b"b"], V2) == [tokens_of(V2, b"a"), None]
        assert store.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), tokens_of(V1, b"b")]
        assert store.get_many("tokens", [b"a"], V3) == [None]

    def test_a_later_record_replaces_an_earlier_one(self, store):
        fill(store, V1, b"a")
        store.commit([*writes(b"a", mark=b"second"), *writes(b"a", mark=b"third")], V1)
        assert store.get_many("tokens", [b"a"], V1) == [b"tokens of a third"]
        assert store.versions()[0].num_users == 1

    def test_one_kind_may_be_written_without_the_others(self, store):
        fill(store, V1, b"a")
        store.commit([("border", b"a", b"new")], V1)
        assert store.get_many("border", [b"a"], V1) == [b"new"]
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]

    def test_a_position_is_a_record_of_no_user(self, store):
        """Committed with others or alone; it goes with its version, and no other has it."""
        fill(store, V1, b"a")
        store.commit([*writes(b"b"), ("position", b"log", b"1")], V1)
        store.commit([("position", b"log", b"2")], V1)
        assert store.get_many("position", [b"log", b"a"], V1) == [b"2", None]
        assert list(store.scan("position", V1)) == [(b"log", b"2")]
        assert store.versions()[0].num_users == 2
        fill(store, V2, b"a")
        assert store.get_many("position", [b"log"], V2) == [None]
        store.publish(V2)
        assert store.drop_version(V1) == 5
        assert store.get_many("position", [b"log"], V1) == [None]

    def test_any_key_and_any_value_will_do(self, store):
        """Keys that begin others, with zero bytes, of all bytes, the longest; an empty value and a large one."""
        keys = [b"s:", b"s:\0", b"s:\0\0", b"s:a", b"s:aa", bytes(range(256)), b"x" * LONGEST_KEY]
        values = [b"", b"\0", *(bytes([n]) * 10**n for n in range(5)), bytes(range(256)) * 8000]
        store.begin_version(V1, *SHAPE, expected_users=1)
        for key, value in zip(keys, values, strict=False):
            store.commit([("tokens", key, value)], V1)
        store.commit([("state", keys[0], values[-1])], V1)
        assert store.get_many("tokens", keys, V1) == values[: len(keys)]
        assert store.get_many("state", keys[:2], V1) == [values[-1], None]
        assert list(store.scan("tokens", V1)) == sorted(zip(keys, values, strict=False))

    def test_a_commit_happens_only_as_long_as_records_are_as_it_is_provided(self, store):
        store.begin_version(V1, *SHAPE, expected_users=1)
        first, second = ("position", b"log", b"first"), ("position", b"log", b"second")
        store.commit([first, ("position", b"other", b"x")], V1)
        store.commit(writes(b"a"), V1, [first, ("position", b"other", b"x")])
        for provided in ([second], [first, ("position", b"no such", b"x")], [first, ("state", b"a", b"")]):
            with pytest.raises(Superseded, match="it was not done"):
                store.commit([*writes(b"b"), second], V1, provided)
        assert store.get_many("state", [b"a", b"b"], V1) == [writes(b"a")[1][2], None]
        assert store.get_many("position", [b"log"], V1) == [b"first"]
        with pytest.raises(Superseded, match="it was not done"):
            store.commit([second], V1, [("position", b"log", None)])
        store.commit([second], V1, [first, ("position", b"nobody", None)])  # compare and set
        assert store.get_many("position", [b"log"], V1) == [b"second"]

    def test_a_commit_is_all_or_nothing(self, store):
        fill(store, V1, b"a")
        with pytest.raises(StoreError):
            store.commit([*writes(b"a", b"b", mark=b"lost"), ("tokens", b"x" * (LONGEST_KEY + 1), b"")], V1)
        assert store.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), None]
        assert store.versions()[0].num_users == 1

    def test_what_no_record_can_be_named_is_refused(self, store):
        fill(store, V1, b"a")
        with pytest.raises(StoreError, match="kind 'token'"):
            store.get_many("token", [b"a"], V1)
        with pytest.raises(StoreError, match="kind 'token'"):
            store.commit([("token", b"a", b"")], V1)
        with pytest.raises(StoreError, match="user key of 481 bytes"):
            store.get_many("tokens", [b"x" * 481], V1)
        for version in ("", "short", V1 + "0"):  # one that begins another would reach into it
            with pytest.raises(StoreError, match="16 bytes"):
                store.begin_version(version, *SHAPE, expected_users=1)
            with pytest.raises(StoreError, match="16 bytes"):
                store.get_many("tokens", [b"a"], version)
            with pytest.raises(StoreError, match="16 bytes"):
                store.drop_version(version)
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]

    def test_a_version_that_was_not_begun_takes_nothing(self, store):
        fill(store, V1, b"a")
        for action in (lambda: store.commit(writes(b"a"), V2), lambda: store.complete_version(V2)):
            with pytest.raises(StoreError, match=f"{V2} was not begun"):
                action()
        assert [info.version for info in store.versions()] == [V1]
        assert store.get_many("tokens", [b"a"], V2) == [None]

    def test_a_user_is_removed_from_one_version_or_all(self, store):
        fill(store, V1, b"a", b"b")
        fill(store, V2, b"a", b"b")
        store.commit([("border", b"a", b"borders")], V1)
        assert store.delete(b"a", V1) == 3
        assert [store.get_many(kind, [b"a"], V1) for kind in KINDS] == [[None]] * len(KINDS)
        assert store.get_many("tokens", [b"a", b"b"], V2) == [tokens_of(V2, b"a"), tokens_of(V2, b"b")]
        assert store.delete(b"a", V1) == 0
        assert [info.num_users for info in store.versions()] == [1, 2]
        assert store.delete(b"b") == 4
        assert [info.num_users for info in store.versions()] == [0, 1]
        assert store.delete(b"nobody") == 0
        assert list(store.scan("tokens", V1)) == []

    def test_a_scan_gives_all_of_a_kind_in_order(self, store):
        users = numbered(MANY)
        fill(store, V1, *reversed(users))
        fill(store, V2, b"i:000000")
        assert list(store.scan("tokens", V1)) == [(user, tokens_of(V1, user)) for user in users]
        assert [user for user, _ in store.scan("state", V1)] == users
        assert list(store.scan("border", V1)) == []
        assert list(store.scan("tokens", V2)) == [(b"i:000000", tokens_of(V2, b"i:000000"))]

    def test_what_was_there_before_a_scan_is_in_it_whatever_is_written_meanwhile(self, store):
        users = numbered(MANY)
        fill(store, V1, *users[::2])
        found = []
        for place, (user, _) in enumerate(store.scan("tokens", V1)):
            found.append(user)
            if place % 100 == 0:
                store.commit([("state", user, b"x" * 100_000)], V1)
                store.commit(writes(users[2 * place + 1]), V1)
        assert sorted(set(found)) == found
        assert set(users[::2]) <= set(found)

    # -- opening and closing

    def test_all_is_still_there_when_opened_again(self, url):
        with open_store(url) as store:
            fill(store, V1, b"a")
            store.publish(V1)
            before = store.versions()
        for read_only in (False, True):
            with open_store(url, read_only) as store:
                assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
                assert store.versions() == before
                assert store.published() == V1

    def test_a_read_only_store_is_not_written(self, url):
        with open_store(url) as store:
            fill(store, V1, b"a")
        with open_store(url, read_only=True) as store:
            for action in (
                lambda: store.commit(writes(b"b"), V1),
                lambda: store.begin_version(V2, *SHAPE, expected_users=1),
                lambda: store.publish(V1),
                lambda: store.delete(b"a"),
                lambda: store.drop_version(V1),
                store.compact,
            ):
                with pytest.raises(StoreError, match="cannot be written"):
                    action()
            assert store.get_many("tokens", [b"a", b"b"], V1) == [tokens_of(V1, b"a"), None]

    def test_what_is_not_there_cannot_be_opened_to_be_read(self, url):
        with pytest.raises(StoreError, match="there is no store"):
            open_store(url, read_only=True)

    def test_a_closed_store_says_so(self, url):
        store = open_store(url)
        fill(store, V1, b"a")
        store.close()
        store.close()
        with pytest.raises(StoreError, match="cannot be read"):
            store.get_many("tokens", [b"a"], V1)
        with pytest.raises(StoreError, match="cannot be written"):
            store.commit(writes(b"a"), V1)

    # -- versions

    def test_what_is_known_of_a_version(self, store):
        store.begin_version(V1, 8, 4, expected_users=3)
        (info,) = store.versions()
        assert info == VersionInfo(V1, 8, 4, 3, num_users=0, is_complete=False, created_us=info.created_us)
        assert info.created_us > 1_500_000_000_000_000
        store.commit(writes(b"a", b"b"), V1)
        store.complete_version(V1)
        assert store.versions() == [VersionInfo(V1, 8, 4, 3, 2, True, info.created_us)]

    def test_versions_are_listed_from_the_oldest(self, store):
        for version in (V3, V1, V2):
            fill(store, version, b"a")
        assert [info.version for info in store.versions()] == [V3, V1, V2]

    def test_a_version_can_be_gone_on_with(self, store):
        """Its records stay, and it is not complete until the new run says so."""
        fill(store, V1, b"a")
        created_us = store.versions()[0].created_us
        store.begin_version(V1, *SHAPE, expected_users=5)
        assert store.versions() == [VersionInfo(V1, *SHAPE, 5, 1, False, created_us)]
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
        for shape in ((9, 4), (8, 5)):
            with pytest.raises(StoreError, match=f"has 8 x 4 tokens, not {shape[0]} x {shape[1]}"):
                store.begin_version(V1, *shape, expected_users=5)

    def test_only_what_is_complete_is_published_unless_forced(self, store):
        with pytest.raises(StoreError, match=f"{V1} is not in the store; run: vista summarize"):
            store.publish(V1)
        with pytest.raises(StoreError, match="is not in the store"):
            store.publish(V1, force=True)
        fill(store, V1, *numbered(100), complete=False)
        with pytest.raises(StoreError, match="100 of 100 users and its bulk run has not ended"):
            store.publish(V1)
        store.begin_version(V1, *SHAPE, expected_users=102)
        store.complete_version(V1)
        with pytest.raises(StoreError, match="100 of 102 users; finish it"):
            store.publish(V1)
        assert store.published() is None
        store.publish(V1, force=True)
        assert store.published() == V1
        store.begin_version(V2, *SHAPE, expected_users=101)
        store.commit(writes(*numbered(100)), V2)
        store.complete_version(V2)
        store.publish(V2)  # 99 in a hundred are enough
        assert store.published() == V2

    def test_a_version_for_nobody_can_be_published(self, store):
        fill(store, V1)
        store.publish(V1)
        assert store.published() == V1

    def test_rolling_back_publishes_what_was_published_before(self, store):
        fill(store, V1, b"a")
        with pytest.raises(StoreError, match="nothing to roll back to"):
            store.rollback()
        store.publish(V1)
        with pytest.raises(StoreError, match="nothing to roll back to"):
            store.rollback()
        assert store.previous() is None
        fill(store, V2, b"a")
        store.publish(V2)
        store.publish(V2)  # once more changes nothing: V1 is still what was before
        assert (store.published(), store.previous()) == (V2, V1)
        assert store.rollback() == V1
        assert (store.published(), store.previous()) == (V1, V2)
        assert store.rollback() == V2
        assert store.published() == V2

    def test_a_version_in_use_is_not_dropped(self, store):
        for version in (V1, V2):
            fill(store, version, b"a", b"b")
            store.publish(version)
        for version in (V1, V2):
            with pytest.raises(StoreError, match=f"{version} is published or the one to roll back to"):
                store.drop_version(version)
        assert store.rollback() == V1

    def test_a_dropped_version_is_gone_and_others_are_not(self, store):
        for version in (V1, V2, V3):
            fill(store, version, *numbered(300))
        store.publish(V1)
        store.publish(V3)
        assert store.drop_version(V2) == 600
        assert [info.version for info in store.versions()] == [V1, V3]
        assert [list(store.scan(kind, V2)) for kind in KINDS] == [[]] * len(KINDS)
        for version in (V1, V3):
            assert len(list(store.scan("tokens", version))) == len(list(store.scan("state", version))) == 300
        assert store.drop_version(V2) == 0
        fill(store, V2, b"a")  # and it can come back
        assert store.versions()[-1].num_users == 1

    # -- compaction

    def test_compaction_changes_nothing_that_can_be_read(self, store):
        users = numbered(MANY)
        for version in (V1, V2):
            fill(store, version, *users)
            store.publish(version)
        store.commit([("border", users[3], b"x" * 100_000), ("state", users[5], b"")], V1)
        for user in users[::2]:
            store.delete(user, V2)
        everything = [list(store.scan(kind, version)) for kind in KINDS for version in (V1, V2)]
        known = store.versions(), store.published()
        for _ in range(2):
            assert store.compact() >= 0
            assert [list(store.scan(kind, version)) for kind in KINDS for version in (V1, V2)] == everything
            assert (store.versions(), store.published()) == known
        store.commit(writes(b"new"), V1)
        assert store.get_many("tokens", [b"new", users[0]], V1) == [b"tokens of new ", tokens_of(V1, users[0])]
        assert store.rollback() == V1

    def test_an_empty_store_can_be_compacted(self, store):
        assert store.compact() >= 0
        assert store.versions() == []
        fill(store, V1, b"a")
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]

    def test_threads_read_and_write_while_it_is_compacted(self, store):
        """No write is lost, no reader is sent back in time, and a scan goes on where it was."""
        users = numbered(MANY)
        fill(store, V1, *users)
        stop, has_written = threading.Event(), threading.Barrier(3)

        def compact() -> None:
            has_written.wait()  # compaction can be over before another thread has begun
            for _ in range(10):
                store.compact()
            stop.set()

        def write(thread: int) -> None:
            number = 0
            store.commit(writes(b"thread %d" % thread, mark=b"first"), V1)
            has_written.wait()
            while not stop.is_set():
                store.commit(writes(b"thread %d" % thread, mark=b"%d" % number), V1)
                assert store.get_many("tokens", [b"thread %d" % thread], V1)[0].endswith(b" %d" % number)
                number += 1

        def scan() -> None:
            while not stop.is_set():
                assert [user for user, _ in store.scan("tokens", V1)][:MANY] == users

        run_threads([compact, partial(write, 1), partial(write, 2), scan])
        assert store.versions()[0].num_users == MANY + 2

    def test_records_and_bytes_are_counted_by_version_and_kind(self, store):
        assert store.statistics() == []
        store.begin_version(V2, *SHAPE, expected_users=2)
        assert store.statistics() == []
        store.commit([("tokens", b"a", b"x" * 70_000), ("tokens", b"b", b""), ("border", b"a", b"123")], V2)
        fill(store, V1, *numbered(MANY))
        state_bytes = sum(len(blob) for _, blob in store.scan("state", V1))
        tokens_bytes = sum(len(blob) for _, blob in store.scan("tokens", V1))
        assert store.statistics() == [
            KindStatistics(V2, "tokens", 2, 70_000),
            KindStatistics(V2, "border", 1, 3),
            KindStatistics(V1, "tokens", MANY, tokens_bytes),
            KindStatistics(V1, "state", MANY, state_bytes),
        ]
        store.delete(b"a", V2)
        assert store.statistics()[0] == KindStatistics(V2, "tokens", 1, 0)

    def test_what_is_not_in_use_can_be_collected(self, store):
        """The newest of those that are not, say one that waits to be published, can be kept."""
        v0, v4 = "version-0-of-abc", "version-4-of-abc"
        for version in (v0, V1, V2, V3, v4):
            fill(store, version, b"a")
        store.publish(V1)
        store.publish(V3)
        num_bytes = len(tokens_of(V2, b"a")) + len(b"state of a " + V2.encode())
        assert collect(store, keep=3) == {}
        assert collect(store, keep=2) == {v0: num_bytes}
        assert collect(store, keep=1) == {V2: num_bytes}
        assert [info.version for info in store.versions()] == [V1, V3, v4]
        assert collect(store) == {v4: num_bytes}
        assert (store.published(), store.previous()) == (V3, V1)
        assert store.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]

    # -- many at once

    def test_a_reader_sees_one_moment(self, store):
        """Threads read all users while another writes all of them again: never two generations at once."""
        users = numbered(50)
        fill(store, V1, *users)
        stop, seen, torn = threading.Event(), set(), []

        def read() -> None:
            while not stop.is_set():
                found = {blob.rsplit(b" ", 1)[1] for blob in store.get_many("tokens", users, V1) if blob}
                seen.update(found)
                if len(found) != 1:
                    torn.append(found)

        def write() -> None:
            for generation in until(lambda: len(seen) > 3, least=60):
                store.commit(writes(*users, mark=b"%d" % generation), V1)
            stop.set()

        run_threads([read] * 3 + [write])
        assert torn == []
        assert len(seen) > 3, "the readers never saw the writer at work"

    def test_a_reader_never_mixes_versions_while_they_are_flipped(self, store):
        """Threads ask which version is published and read it, while another thread publishes and rolls back."""
        users = numbered(50)
        for version in (V1, V2):
            fill(store, version, *users)
        store.publish(V1)
        stop, seen, mixed = threading.Event(), set(), []

        def read() -> None:
            while not stop.is_set():
                version = store.published()
                found = store.get_many("tokens", users, version)
                seen.add(version)
                if found != [tokens_of(version, user) for user in users]:
                    mixed.append((version, found))

        def flip() -> None:
            for n in until(lambda: seen == {V1, V2}, least=30):
                store.publish((V2, V1)[n % 2])
                store.rollback()
            stop.set()

        run_threads([read] * 3 + [flip])
        assert mixed == []
        assert seen == {V1, V2}, "the readers never saw a flip"

    def test_no_version_is_lost_when_many_are_begun_at_once(self, store):
        names = [f"version{thread}-{n:02}-abcd" for thread in range(3) for n in range(15)]

        def begin(thread: int) -> None:
            for version in names[15 * thread : 15 * (thread + 1)]:
                store.begin_version(version, *SHAPE, expected_users=0)
                store.complete_version(version)

        run_threads([partial(begin, thread) for thread in range(3)])
        infos = store.versions()
        assert sorted(info.version for info in infos) == names
        assert all(info.is_complete for info in infos)

    def test_threads_write_side_by_side(self, store):
        """While others fail in the middle of theirs and others read."""
        fill(store, V1)
        refused = []

        def write(thread: int) -> None:
            for n in range(20):
                store.commit(writes(b"%d-%02d" % (thread, n), mark=b"x" * 1000 * n), V1)

        def fail() -> None:
            for _ in range(20):
                try:
                    store.commit([*writes(b"lost"), ("tokens", b"x" * (LONGEST_KEY + 1), b"")], V1)
                except StoreError as error:
                    refused.append(error)

        def read() -> None:
            for _ in range(20):
                assert all(blob.startswith(b"tokens of " + user) for user, blob in store.scan("tokens", V1))

        run_threads([partial(write, 1), partial(write, 2), fail, fail, read, read])
        assert len(refused) == 40
        assert [user for user, _ in store.scan("tokens", V1)] == [
            b"%d-%02d" % (t, n) for t in (1, 2) for n in range(20)
        ]
        assert store.versions()[0].num_users == 40


def until(is_enough: Callable[[], bool], least: int) -> Iterator[int]:
    """Count up to ``least``, and on until it is enough, but for half a minute only."""
    end_s = time.monotonic() + 30
    for number in itertools.count():
        if number >= least and (is_enough() or time.monotonic() > end_s):
            return
        yield number


def run_threads(tasks: list[Callable[[], None]]) -> None:
    """All at once until all end; the first exception any of them raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for task in [pool.submit(task) for task in tasks]:
            task.result(timeout=60)
