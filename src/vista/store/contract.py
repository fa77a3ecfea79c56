"""What a summary store is, whatever engine holds it.

A store keeps, per model version, two records per user (kinds ``tokens`` and ``state``), a third where borders are kept
(``border``), and one per partition of every event log that is streamed into it (``position``). Versions lie side by
side; at most one is *published*. A reader names its version, so that tokens of one model never reach another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from vista.errors import StoreError
from vista.store.versions import VersionInfo

Write = tuple[str, bytes, bytes]  # kind, user key, encoded record
Provided = tuple[str, bytes, bytes | None]  # the same; None: no such record


@dataclass(frozen=True)
class KindStatistics:
    """How many records of one kind a version has, and the bytes of all of them together."""

    version: str
    kind: str
    num_records: int
    num_bytes: int


class SummaryStore(Protocol):
    """The contract; tests/contracts/store.py holds every engine to it. All methods raise StoreError on failure."""

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        """Make room for a version, or go on with it; refuses one with other K or D."""

    def commit(self, writes: Sequence[Write], version: str, provided: Sequence[Provided] = ()) -> None:
        """Write records, all or none; durable when it returns.

        provided: records that must be stored as they are given here, or not be there, when the writes happen, in the
        same step (on a Redis cluster just before it); else nothing is written and Superseded is raised.
        """

    def get_many(self, kind: str, user_keys: Sequence[bytes], version: str) -> list[bytes | None]:
        """The records of some users, None where there is none, all from one moment."""

    def delete(self, user_key: bytes, version: str | None = None) -> int:
        """Remove a user's records from one version or all; how many records were there."""

    def scan(self, kind: str, version: str) -> Iterator[tuple[bytes, bytes]]:
        """All (user key, record) of a kind, in order of the keys."""

    def complete_version(self, version: str) -> None:
        """Say that a bulk run has come to its end."""

    def versions(self) -> list[VersionInfo]:
        """All versions, oldest first."""

    def published(self) -> str | None:
        """The published version, None where there is none."""

    def publish(self, version: str, force: bool = False) -> None:
        """Make a version the published one, in one atomic step. Refuses an incomplete one unless forced."""

    def rollback(self) -> str:
        """Publish again what was published before; returns it."""

    def previous(self) -> str | None:
        """The version a rollback would publish, None where there is none."""

    def drop_version(self, version: str) -> int:
        """Remove a version that is neither published nor the one to roll back to; how many records it had."""

    def compact(self) -> int:
        """Leave no byte of deleted or replaced records in what the store keeps; how many bytes that freed."""

    def statistics(self) -> list[KindStatistics]:
        """Records and bytes of every version and kind that has any; versions oldest first, kinds in order."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_store(url: str, read_only: bool = False) -> SummaryStore:
    """Open a store by URL.

    ``lmdb:PATH`` or a bare path; ``redis://[user:password@]host[:port][/db]`` (``rediss://`` with TLS), ``unix:SOCKET``
    for the same over a socket of this machine; ``memory:NAME`` in this process. Raises StoreError for any other
    scheme, for a store that cannot be opened, and, where it is only to be read, for one that is not there.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or "/" in scheme:
        scheme, rest = "lmdb", url
    match scheme:
        case "lmdb":
            from vista.store.lmdb_store import LmdbStore

            return LmdbStore(rest, read_only)
        case "redis" | "rediss" | "unix":
            from vista.store.redis_store import RedisStore

            return RedisStore(url, read_only)
        case "memory":
            from vista.store.memory_store import MemoryStore

            return MemoryStore(rest, read_only)
        case _:
            raise StoreError(
                f"store {shown(url)!r}: unknown scheme {scheme!r}; use lmdb:PATH or a path, redis://HOST, unix:SOCKET, "
                "memory:NAME"
            )


def shown(url: str) -> str:
    """A URL without its password, for messages."""
    return re.sub(r"password=[^&]*", "password=***", re.sub(r"(//[^:@/]*):[^@]*@", r"\1:***@", url))


def collect(store: SummaryStore, keep: int = 0) -> dict[str, int]:
    """Drop every version that is neither published nor the one to roll back to, but the ``keep`` newest of them.

    Returns the bytes that each dropped version's records had, oldest first.
    """
    in_use = (store.published(), store.previous())
    unused = [info.version for info in store.versions() if info.version not in in_use]
    num_bytes = dict.fromkeys(unused[: max(len(unused) - keep, 0)], 0)
    for row in store.statistics():
        if row.version in num_bytes:
            num_bytes[row.version] += row.num_bytes
    for version in num_bytes:
        store.drop_version(version)
    return num_bytes
