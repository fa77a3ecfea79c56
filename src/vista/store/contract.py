"""What a summary store is, whatever engine holds it.

A store keeps, per model version, two records per user (kinds ``tokens`` and ``state``). Versions lie side by side; at
most one is *published*. A reader names its version, so that tokens of one model never reach another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Protocol, Self

from vista.errors import StoreError

Write = tuple[str, bytes, bytes]  # kind, user key, encoded record
LEAST_COVERAGE = 0.99  # share of the expected users a version needs to be published unless forced


@dataclass(frozen=True)
class VersionInfo:
    """What a store knows of a model version beside its records."""

    version: str
    num_tokens: int
    width: int
    expected_users: int
    num_users: int = 0
    is_complete: bool = False
    created_us: int = 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class SummaryStore(Protocol):
    """The contract; tests/contracts/store.py holds every engine to it. All methods raise StoreError on failure."""

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        """Make room for a version, or go on with it; refuses one with other K or D."""

    def commit(self, writes: Sequence[Write], version: str) -> None:
        """Write records, all or none; durable when it returns."""

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

    def drop_version(self, version: str) -> int:
        """Remove a version that is neither published nor the one to roll back to; how many records it had."""

    def compact(self) -> int:
        """Leave no byte of deleted or replaced records in what the store keeps; how many bytes that freed."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_store(url: str, read_only: bool = False) -> SummaryStore:
    """Open a store by URL: ``lmdb:PATH``, or a bare path, which means LMDB. Raises StoreError for any other scheme."""
    scheme, colon, path = url.partition(":")
    if not colon or "/" in scheme:
        scheme, path = "lmdb", url
    match scheme:
        case "lmdb":
            from vista.store.lmdb_store import LmdbStore

            return LmdbStore(path, read_only)
        case _:
            raise StoreError(f"store {url!r}: unknown scheme {scheme!r}; use lmdb:PATH or a path")


def check_publishable(info: VersionInfo | None, version: str, force: bool) -> None:
    """Refuse to publish what is not there, not complete, or covers too few of the expected users."""
    if info is None:
        raise StoreError(f"version {version} is not in the store; run: vista summarize")
    coverage = info.num_users / info.expected_users if info.expected_users else 1.0
    if not force and (not info.is_complete or coverage < LEAST_COVERAGE):
        raise StoreError(
            f"version {version} holds {info.num_users} of {info.expected_users} users"
            f"{'' if info.is_complete else ' and its bulk run has not ended'}; finish it with vista summarize, or force"
        )
