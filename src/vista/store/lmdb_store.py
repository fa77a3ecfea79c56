"""The embedded engine: one LMDB environment, many reader processes beside one writer, nothing to run.

Layout: database ``records`` with keys  version (16 bytes) | kind (1 byte) | user key,  database ``facts`` with one
JSON value per version and the publishing pointer. Every commit is one transaction and is on disk when it returns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import lmdb

from vista.errors import StoreError
from vista.store.contract import VersionInfo, Write, check_publishable
from vista.store.record import KINDS

FIRST_MAP_BYTES = 1 << 28  # address space, not disk; doubled when full
MAX_READERS = 512
VERSION_PREFIX, POINTER = b"version:", b"published"
Result = TypeVar("Result")


class LmdbStore:
    """Implements ``SummaryStore``. Open it after fork, once per process."""

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.path = Path(path)
        if read_only and not (self.path / "data.mdb").exists():
            raise StoreError(f"{path}: there is no store; run: vista summarize RUN --data DATA --store {path}")
        try:
            if not read_only:
                self.path.mkdir(parents=True, exist_ok=True)
            grown = (self.path / "data.mdb").stat().st_size * 2 if (self.path / "data.mdb").exists() else 0
            self._env = lmdb.open(
                str(self.path), map_size=max(FIRST_MAP_BYTES, grown), max_dbs=2, max_readers=MAX_READERS,
                readonly=read_only, create=not read_only, readahead=False,
            )  # fmt: skip
            self._env.reader_check()  # frees the slots of readers that were killed
            self._records = self._env.open_db(b"records", create=not read_only)
            self._facts = self._env.open_db(b"facts", create=not read_only)
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{path}: cannot be opened ({error}); check the path, its owner and free space") from error

    # -- records

    def commit(self, writes: Sequence[Write], version: str) -> None:
        def put(transaction: lmdb.Transaction) -> None:
            info = self._info(transaction, version)
            if info is None:
                raise StoreError(f"version {version} was not begun in {self.path}; call begin_version first")
            new_users = 0
            for kind, user, blob in writes:
                key = record_key(version, kind, user)
                new_users += kind == "tokens" and transaction.get(key, db=self._records) is None
                transaction.put(key, blob, db=self._records)
            self._put_info(transaction, replace(info, num_users=info.num_users + new_users))

        self._write(put)

    def get_many(self, kind: str, user_keys: Sequence[bytes], version: str) -> list[bytes | None]:
        with self._reading() as transaction:  # one transaction: all records from one moment
            return [transaction.get(record_key(version, kind, user), db=self._records) for user in user_keys]

    def delete(self, user_key: bytes, version: str | None = None) -> int:
        def remove(transaction: lmdb.Transaction) -> int:
            removed = 0
            for info in self._all_versions(transaction):
                if version in (None, info.version):
                    found = [transaction.delete(record_key(info.version, k, user_key), db=self._records) for k in KINDS]
                    self._put_info(transaction, replace(info, num_users=info.num_users - bool(found[0])))
                    removed += sum(found)
            return removed

        return self._write(remove)

    def scan(self, kind: str, version: str) -> Iterator[tuple[bytes, bytes]]:
        prefix = record_key(version, kind, b"")
        with self._reading() as transaction, transaction.cursor(db=self._records) as cursor:
            if not cursor.set_range(prefix):
                return
            for key, blob in cursor:
                if not key.startswith(prefix):
                    return
                yield key[len(prefix) :], blob

    # -- versions

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        def begin(transaction: lmdb.Transaction) -> None:
            info = self._info(transaction, version)
            if info is None:
                info = VersionInfo(version, num_tokens, width, expected_users, created_us=time.time_ns() // 1000)
            elif (info.num_tokens, info.width) != (num_tokens, width):
                raise StoreError(
                    f"version {version} in {self.path} has {info.num_tokens} x {info.width} tokens, "
                    f"not {num_tokens} x {width}"
                )
            self._put_info(transaction, replace(info, expected_users=expected_users, is_complete=False))

        self._write(begin)

    def complete_version(self, version: str) -> None:
        def complete(transaction: lmdb.Transaction) -> None:
            info = self._info(transaction, version)
            if info is None:
                raise StoreError(f"version {version} was not begun in {self.path}")
            self._put_info(transaction, replace(info, is_complete=True))

        self._write(complete)

    def versions(self) -> list[VersionInfo]:
        with self._reading() as transaction:
            return self._all_versions(transaction)

    def published(self) -> str | None:
        with self._reading() as transaction:
            return self._pointer(transaction)["now"]

    def publish(self, version: str, force: bool = False) -> None:
        def flip(transaction: lmdb.Transaction) -> None:
            check_publishable(self._info(transaction, version), version, force)
            pointer = self._pointer(transaction)
            if pointer["now"] != version:
                self._put_pointer(transaction, {"now": version, "before": pointer["now"]})

        self._write(flip)

    def rollback(self) -> str:
        def flip(transaction: lmdb.Transaction) -> str:
            pointer = self._pointer(transaction)
            before = pointer["before"]
            if before is None or self._info(transaction, before) is None:
                raise StoreError(
                    f"{self.path}: no version was published before {pointer['now']}; nothing to roll back to"
                )
            self._put_pointer(transaction, {"now": before, "before": pointer["now"]})
            return before

        return self._write(flip)

    def drop_version(self, version: str) -> int:
        def drop(transaction: lmdb.Transaction) -> int:
            if version in self._pointer(transaction).values():
                raise StoreError(f"version {version} is published or the one to roll back to; publish another first")
            removed = 0
            with transaction.cursor(db=self._records) as cursor:
                while cursor.set_range(version.encode()) and bytes(cursor.key()).startswith(version.encode()):
                    removed += cursor.delete()
            transaction.delete(VERSION_PREFIX + version.encode(), db=self._facts)
            return removed

        return self._write(drop)

    # -- below

    def _write(self, action: Callable[[lmdb.Transaction], Result]) -> Result:
        """Run an action in one transaction, with a larger map if it does not fit."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    return action(transaction)
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)  # take over the size another process has set
            except lmdb.Error as error:
                raise StoreError(
                    f"{self.path}: cannot be written ({error}); nothing of this write was kept. "
                    "Free space or check permissions, then run again"
                ) from error

    def _reading(self) -> Any:
        try:
            return self._env.begin()
        except lmdb.MapResizedError:
            self._env.set_mapsize(0)
            return self._env.begin()

    def _info(self, transaction: lmdb.Transaction, version: str) -> VersionInfo | None:
        value = transaction.get(VERSION_PREFIX + version.encode(), db=self._facts)
        return None if value is None else VersionInfo(**json.loads(bytes(value)))

    def _put_info(self, transaction: lmdb.Transaction, info: VersionInfo) -> None:
        transaction.put(VERSION_PREFIX + info.version.encode(), json.dumps(info.to_json()).encode(), db=self._facts)

    def _all_versions(self, transaction: lmdb.Transaction) -> list[VersionInfo]:
        with transaction.cursor(db=self._facts) as cursor:
            found = [
                VersionInfo(**json.loads(bytes(value)))
                for key, value in cursor
                if bytes(key).startswith(VERSION_PREFIX)
            ]
        return sorted(found, key=lambda info: info.created_us)

    def _pointer(self, transaction: lmdb.Transaction) -> dict[str, str | None]:
        value = transaction.get(POINTER, db=self._facts)
        return {"now": None, "before": None} if value is None else json.loads(bytes(value))

    def _put_pointer(self, transaction: lmdb.Transaction, pointer: dict[str, str | None]) -> None:
        transaction.put(POINTER, json.dumps(pointer).encode(), db=self._facts)

    def close(self) -> None:
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def record_key(version: str, kind: str, user_key: bytes) -> bytes:
    """version | kind | user key."""
    return version.encode() + bytes([KINDS.index(kind)]) + user_key
