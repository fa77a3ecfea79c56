"""The shared engine: a Redis or Valkey server, or a cluster of them, that many machines read and write.

Layout: the users of a version are spread over 256 buckets. A bucket's keys share one hash slot: a sorted set of its
records' names (kind, user key), and one string per record. What is known of the versions, and which one is published,
is one JSON value, changed by comparing and setting.

A server does every commit in one step (a script), and reads many records in one (MGET). A cluster does one step per
bucket, sent together: there a commit is all or none for each user, and a reader sees each user as of one moment.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import merge
from itertools import islice
from types import TracebackType
from typing import Any, Self, cast

from vista.errors import StoreError, VistaWarning
from vista.store.contract import KindStatistics, Provided, Write, shown
from vista.store.record import KINDS
from vista.store.redis_client import connect, is_durable, primaries
from vista.store.versions import (
    Pointer,
    VersionInfo,
    begin,
    begun,
    check_droppable,
    check_publishable,
    check_version,
    member,
    not_begun,
    superseded,
)

BUCKETS = 256  # per version; more than the servers of any cluster, so that each gets its share
NAMES_AT_ONCE = 64  # names read from a bucket in one go
SCAN_RECORDS = 256  # records read in one go by a scan
MEASURE_RECORDS = 4096  # the same where only the sizes are asked for
REWRITE_POLL_S = 0.05
FACTS = b"vista:facts"
SUPERSEDED = 2  # what COMMIT answers where a needed record is another
Named = tuple[bytes, bytes, bytes]  # bucket, name of the record in it, record
Needed = tuple[bytes, bytes, bytes | None]  # the same; None: no such record

# ARGV: version (empty: it was checked before), then name, record, ...; KEYS: the facts, then bucket, record's key, ...
# Without a name: the SHA-1 of a record that must be there, empty where none may be.
COMMIT = """
if ARGV[1] ~= '' then
  local facts = redis.call('GET', KEYS[1])
  if not (facts and cjson.decode(facts).versions[ARGV[1]]) then return 0 end
end
for i = 2, #ARGV, 2 do
  if ARGV[i] == '' then
    local own = redis.call('GET', KEYS[i + 1])
    if (own and redis.sha1hex(own) or '') ~= ARGV[i + 1] then return 2 end
  end
end
for i = 2, #ARGV, 2 do
  if ARGV[i] ~= '' then
    redis.call('SET', KEYS[i + 1], ARGV[i + 1])
    redis.call('ZADD', KEYS[i], 0, ARGV[i])
  end
end
return 1
"""
REMOVE = """
local removed = 0
for i = 2, #ARGV, 2 do
  redis.call('UNLINK', KEYS[i + 1])
  removed = removed + redis.call('ZREM', KEYS[i], ARGV[i])
end
return removed
"""
SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


@dataclass(frozen=True)
class _Facts:
    """What the store knows beside its records; numbers of users are counted, not kept here."""

    versions: dict[str, VersionInfo] = field(default_factory=dict)
    pointer: Pointer = field(default_factory=Pointer)

    @classmethod
    def parse(cls, text: bytes) -> _Facts:
        if not text:
            return cls()
        found = json.loads(text)
        versions = {name: VersionInfo(**info) for name, info in found["versions"].items()}
        return cls(versions, Pointer(**found["published"]))

    def dump(self) -> bytes:
        versions = {name: info.to_json() for name, info in self.versions.items()}
        return json.dumps({"versions": versions, "published": self.pointer.to_json()}).encode()

    def having(self, info: VersionInfo) -> _Facts:
        return replace(self, versions=self.versions | {info.version: info})


def _sha1(record: bytes) -> bytes:
    """As a script's redis.sha1hex gives it; it tells records apart, and guards nothing."""
    return hashlib.sha1(record, usedforsecurity=False).hexdigest().encode()


class RedisStore:
    """Implements ``SummaryStore``. Threads may share it, and so may processes after a fork."""

    def __init__(self, url: str, read_only: bool = False) -> None:
        self.name, self._read_only = shown(url), read_only
        self._client, self._is_cluster = connect(url)
        self._is_open = True
        try:
            self._look_around()
        except BaseException:
            self.close()
            raise

    def _look_around(self) -> None:
        """Raise StoreError where there is nothing to read, and warn where writes are not safe."""
        with self._reading() as client:
            if self._read_only and not client.exists(FACTS):
                raise StoreError(f"{self.name}: there is no store; run: vista summarize RUN --data DATA --store STORE")
            if self._read_only or is_durable(client, self._is_cluster):
                return
        warnings.warn(
            f"{self.name}: the server may lose acknowledged writes when it is killed, or cannot be asked whether it "
            "may; set: appendonly yes, appendfsync always",
            VistaWarning,
            stacklevel=4,
        )

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._errors("read", "is the server up? Check host, port, password and database"):
            yield self._client

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        kept = "of each user" if self._is_cluster else "of this write"
        remedy = f"{kept} all or nothing was kept. Check the server, its memory and disk, then run again"
        with self._errors("written", remedy):
            if self._read_only:
                raise StoreError(f"{self.name}: cannot be written (it was opened to be read only)")
            yield self._client

    @contextmanager
    def _errors(self, what: str, remedy: str) -> Iterator[None]:
        from redis.exceptions import RedisError

        if not self._is_open:
            raise StoreError(f"{self.name}: cannot be {what} (it was closed); open it again")
        try:
            yield
        except (RedisError, OSError) as error:
            raise StoreError(f"{self.name}: cannot be {what} ({error}); {remedy}") from error

    # -- records

    def commit(self, writes: Sequence[Write], version: str, provided: Sequence[Provided] = ()) -> None:
        named = [(bucket_of(version, user), member(kind, user), bytes(blob)) for kind, user, blob in writes]
        needed = [(bucket_of(version, user), member(kind, user), blob) for kind, user, blob in provided]
        if self._is_cluster:  # the facts are in another slot than the records: a script cannot look at both
            with self._writing() as client:
                begun(_Facts.parse(client.get(FACTS) or b"").versions, version, self.name)
                if any(client.get(record_key(bucket, name)) != blob for bucket, name, blob in needed):
                    raise superseded(self.name)
        done = self._run(COMMIT, named, version, needed)
        if SUPERSEDED in done:
            raise superseded(self.name)
        if not all(done):
            raise not_begun(version, self.name)

    def get_many(self, kind: str, user_keys: Sequence[bytes], version: str) -> list[bytes | None]:
        check_version(version)
        keys = [record_key(bucket_of(version, user), member(kind, user)) for user in user_keys]
        if not keys:
            return []
        with self._reading() as client:
            if not self._is_cluster:
                return cast("list[bytes | None]", client.mget(keys))
            return cast("list[bytes | None]", _pipelined(client, "GET", [(key,) for key in keys]))

    def delete(self, user_key: bytes, version: str | None = None) -> int:
        chosen = self._facts().versions if version is None else [version]
        named = [(bucket_of(name, user_key), member(kind, user_key), b"") for name in chosen for kind in KINDS]
        return sum(self._run(REMOVE, named)) if named else 0

    def scan(self, kind: str, version: str) -> Iterator[tuple[bytes, bytes]]:
        check_version(version)
        users = (name[1:] for _, name in self._names(kind, version))
        while some := list(islice(users, SCAN_RECORDS)):
            found = zip(some, self.get_many(kind, some, version), strict=True)
            yield from ((user, blob) for user, blob in found if blob is not None)

    def _names(self, kind: str, version: str) -> Iterator[tuple[bytes, bytes]]:
        """(bucket, name) of all records of a kind, in order of their names."""
        first, last = _range(kind)
        buckets = _buckets(version)
        with self._reading() as client:
            asked = [(bucket, first, last, "LIMIT", 0, NAMES_AT_ONCE) for bucket in buckets]
            pages = _pipelined(client, "ZRANGEBYLEX", asked)

        def rest(bucket: bytes, page: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
            while page:
                yield from ((name, bucket) for name in page)
                with self._reading() as client:
                    page = client.zrangebylex(bucket, b"(" + page[-1], last, 0, NAMES_AT_ONCE)

        for name, bucket in merge(*map(rest, buckets, pages)):
            yield bucket, name

    def _run(self, script: str, named: Sequence[Named], version: str = "", needed: Sequence[Needed] = ()) -> list[int]:
        """Run a script over some records: in one step on a server, in one per bucket, sent together, on a cluster.

        needed: records that a server is to find as they are, or not at all.
        """
        groups: dict[bytes, list[Named]] = {} if self._is_cluster else {b"": list(named)}
        for row in named if self._is_cluster else ():
            groups.setdefault(row[0], []).append(row)
        calls = []
        for rows in groups.values():
            keys, values = [rows[0][0] if self._is_cluster else FACTS], [b"" if self._is_cluster else version.encode()]
            for bucket, name, blob in rows:
                keys += [bucket, record_key(bucket, name)]
                values += [name, blob]
            for bucket, name, record in () if self._is_cluster else needed:
                keys += [bucket, record_key(bucket, name)]
                values += [b"", b"" if record is None else _sha1(record)]
            calls.append((script, len(keys), *keys, *values))
        with self._writing() as client:
            return _pipelined(client, "EVAL", calls)

    # -- versions

    def _facts(self) -> _Facts:
        with self._reading() as client:
            return _Facts.parse(client.get(FACTS) or b"")

    def _update(self, change: Callable[[_Facts], _Facts]) -> _Facts:
        """Change the facts in one step: compare and set, once more if another writer was faster."""
        with self._writing() as client:
            while True:
                before = client.get(FACTS) or b""
                facts = _Facts.parse(before)
                after = change(facts)
                if after == facts or client.eval(SWAP, 1, FACTS, before, after.dump()):
                    return after

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        check_version(version)
        wanted = VersionInfo(version, num_tokens, width, expected_users)
        self._update(lambda facts: facts.having(begin(facts.versions.get(version), wanted, self.name)))

    def complete_version(self, version: str) -> None:
        self._update(lambda f: f.having(replace(begun(f.versions, version, self.name), is_complete=True)))

    def versions(self) -> list[VersionInfo]:
        found = self._facts().versions.values()
        return sorted((self._counted(info) for info in found), key=lambda info: info.created_us)

    def _counted(self, info: VersionInfo) -> VersionInfo:
        with self._reading() as client:
            counts = _pipelined(client, "ZLEXCOUNT", [(b, *_range("tokens")) for b in _buckets(info.version)])
        return replace(info, num_users=sum(counts))

    def published(self) -> str | None:
        return self._facts().pointer.now

    def previous(self) -> str | None:
        return self._facts().pointer.before

    def publish(self, version: str, force: bool = False) -> None:
        def flip(facts: _Facts) -> _Facts:
            info = facts.versions.get(version)
            check_publishable(None if info is None else self._counted(info), version, force)
            return replace(facts, pointer=facts.pointer.flipped(version))

        self._update(flip)

    def rollback(self) -> str:
        after = self._update(lambda facts: replace(facts, pointer=facts.pointer.rolled_back(facts.versions, self.name)))
        return cast(str, after.pointer.now)

    def drop_version(self, version: str) -> int:
        """In parts, so that the server goes on answering; until the last one the version is there, but not complete."""
        check_version(version)

        def mark(facts: _Facts) -> _Facts:
            check_droppable(facts.pointer, version)
            known = facts.versions.get(version)
            return facts if known is None else facts.having(replace(known, is_complete=False))

        def forget(facts: _Facts) -> _Facts:
            check_droppable(facts.pointer, version)
            return replace(facts, versions={name: info for name, info in facts.versions.items() if name != version})

        self._update(mark)
        removed = self._sweep(version)
        self._update(forget)
        return removed + self._sweep(version)  # what was written meanwhile

    def _sweep(self, version: str) -> int:
        removed, buckets = 0, _buckets(version)
        while True:
            with self._reading() as client:
                pages = _pipelined(client, "ZRANGE", [(bucket, 0, NAMES_AT_ONCE - 1) for bucket in buckets])
            named = [(bucket, name, b"") for bucket, page in zip(buckets, pages, strict=True) for name in page]
            if not named:
                return removed
            removed += sum(self._run(REMOVE, named))

    def statistics(self) -> list[KindStatistics]:
        rows = []
        for info in self.versions():
            for kind in KINDS:
                sizes = self._sizes(kind, info.version)
                rows += [KindStatistics(info.version, kind, len(sizes), sum(sizes))] if sizes else []
        return rows

    def _sizes(self, kind: str, version: str) -> list[int]:
        """Bytes of every record of a kind."""
        names, sizes = self._names(kind, version), []
        while some := list(islice(names, MEASURE_RECORDS)):
            with self._reading() as client:
                sizes += _pipelined(client, "STRLEN", [(record_key(*row),) for row in some])
        return sizes

    def compact(self) -> int:
        """Rewrite so that nothing deleted or replaced is left in the store's files; bytes freed.

        Waits for the server's append-only file to be rewritten, and for a new snapshot where it keeps some.
        """
        with self._writing() as client:
            return sum(_rewrite(server) for server in primaries(client, self._is_cluster))

    def close(self) -> None:
        self._is_open = False
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bucket_of(version: str, user_key: bytes) -> bytes:
    """The bucket of a user. What is in braces chooses a cluster's slot; it begins with digits, so it is never empty."""
    return b"vista:{%02x%s}" % (zlib.crc32(user_key) % BUCKETS, version.encode())


def record_key(bucket: bytes, name: bytes) -> bytes:
    """The key of a record, in the slot of its bucket."""
    return bucket + b":" + name


def _buckets(version: str) -> list[bytes]:
    return [b"vista:{%02x%s}" % (number, version.encode()) for number in range(BUCKETS)]


def _range(kind: str) -> tuple[bytes, bytes]:
    """Where the names of a kind lie in a bucket."""
    (number,) = member(kind, b"")
    return b"[" + bytes([number]), b"(" + bytes([number + 1])


def _pipelined(client: Any, command: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The answers to many calls of one command, sent together."""
    with client.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.execute_command(command, *call)
        return cast("list[Any]", pipe.execute())


def _rewrite(server: Any) -> int:
    """Rewrite the files of one server; bytes of the append-only file that this freed. Raises StoreError if it fails."""
    before = server.info("persistence")
    if server.config_get("save").get("save"):
        server.bgsave(schedule=True)
    if before["aof_enabled"]:
        server.bgrewriteaof()
    running = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
    while any(int((after := server.info("persistence"))[name]) for name in running):
        time.sleep(REWRITE_POLL_S)
    if "err" in (after["aof_last_bgrewrite_status"], after["rdb_last_bgsave_status"]):
        raise StoreError("the server could not rewrite its files; look at its log, check its disk, then run again")
    # a rewritten file of next to nothing is longer than none
    return max(int(before["aof_current_size"]) - int(after["aof_current_size"]), 0) if before["aof_enabled"] else 0
