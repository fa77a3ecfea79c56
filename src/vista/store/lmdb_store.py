"""The embedded engine: one LMDB environment, many reader processes beside one writer, nothing to run.

Layout: database ``records`` with keys  version (16 bytes) | kind (1 byte) | user key,  database ``facts`` with one
JSON value per version and the publishing pointer. Every commit is one transaction and is on disk when it returns.

Compaction writes all records into a new environment, the next *generation* (`vista.store.generations`), while it holds
the lock of writers; its last step is a commit to the old one of the fact that the store has moved. Every transaction
looks for that fact first, so whoever has the old generation open, in any process, goes over before it reads or writes
again: no write is lost, and no reader is left behind. Killed before that commit, the old generation is whole and in
use; after it, the new one.

Threads may share a store. Growing the map pulls it from under the transactions of the process, and py-lmdb's abort
waits until no other thread is inside LMDB, perhaps for ever. So threads write one at a time, both keep readers out
while they last, and no transaction is open while a caller holds a part of a scan.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import lmdb

from vista.errors import StoreError
from vista.files import sync
from vista.store.contract import KindStatistics, Provided, Write
from vista.store.generations import FIRST, Generations
from vista.store.record import KINDS
from vista.store.versions import (
    Pointer,
    VersionInfo,
    begin,
    check_droppable,
    check_publishable,
    check_version,
    member,
    not_begun,
    superseded,
)

FIRST_MAP_BYTES = 1 << 28  # address space, not disk; doubled when full
MAX_READERS = 512
SCAN_RECORDS = 256  # read in one transaction: an open one keeps the writer from using freed space again
COPY_BYTES = 1 << 26  # of records that compaction copies in one transaction, held in memory
MEASURE_RECORDS = 65_536  # the same where only the sizes are looked at
VERSION_PREFIX, POINTER, MOVED = b"version:", b"published", b"moved to generation"
Result = TypeVar("Result")


class _Moved(Exception):
    """The generation that is open has been left."""


class LmdbStore:
    """Implements ``SummaryStore``. Open it after fork, once per process."""

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.path, self._is_read_only = Path(path), read_only
        self._generations = Generations(self.path)
        self._writing, self._readers = threading.Lock(), _Readers()
        if (self.path / "data.mdb").exists():
            raise StoreError(
                f"{path}: a database without generations, of an early vista or of another program; move it away, then "
                f"run: vista summarize RUN --data DATA --store {path}"
            )
        if read_only and self._generations.current() is None:
            raise StoreError(f"{path}: there is no store; run: vista summarize RUN --data DATA --store {path}")
        self._open()

    def _open(self) -> None:
        """Open the newest generation. Nobody's transaction may be open."""
        number = self._generations.current()
        try:
            if number is None:
                self._generations.folder(FIRST).mkdir(parents=True, exist_ok=True)
            self._open_generation(number or FIRST)
            try:
                if number is None:
                    self._generations.claim_first()
                while (newer := self._newer()) is not None:
                    self._env.close()
                    self._open_generation(newer)
                if not self._is_read_only and not self._generations.is_tidy(self._number):
                    self._tidy()
            except BaseException:
                self._env.close()  # or this process could not open it again
                raise
        except (lmdb.Error, OSError) as error:
            if self._generations.current() in (None, number):
                raise self._cannot_open(error) from error
            self._open()  # what we were about to open was left and removed

    def _open_generation(self, number: int) -> None:
        folder, self._number = self._generations.folder(number), number
        data = folder / "data.mdb"
        grown = data.stat().st_size * 2 if data.exists() else 0
        self._env = lmdb.open(
            str(folder), map_size=max(FIRST_MAP_BYTES, grown), max_dbs=2, max_readers=MAX_READERS,
            readonly=self._is_read_only, create=False, readahead=False,
        )  # fmt: skip
        try:
            self._env.reader_check()  # frees the slots of readers that were killed
            self._records = self._env.open_db(b"records", create=not self._is_read_only)
            self._facts = self._env.open_db(b"facts", create=not self._is_read_only)
        except lmdb.Error:
            self._env.close()
            raise

    def _newer(self) -> int | None:
        """The generation to go over to, None where this one is in use."""
        with self._env.begin() as transaction:
            moved = transaction.get(MOVED, db=self._facts)
        current = self._generations.current()
        if moved is not None:
            return int(bytes(moved))
        return None if current is None or current <= self._number else current

    def _tidy(self) -> None:
        """Finish what a killed compaction left, unless the store moves meanwhile."""
        transaction = self._env.begin(write=True)
        try:
            if transaction.get(MOVED, db=self._facts) is None:
                self._generations.tidy(self._number)
        finally:
            transaction.abort()

    def _cannot_open(self, error: Exception) -> StoreError:
        return StoreError(f"{self.path}: cannot be opened ({error}); check the path, its owner and free space")

    # -- records

    def commit(self, writes: Sequence[Write], version: str, provided: Sequence[Provided] = ()) -> None:
        def put(transaction: lmdb.Transaction) -> None:
            info = self._info(transaction, version)
            if info is None:
                raise not_begun(version, str(self.path))
            for kind, user, blob in provided:
                if transaction.get(record_key(version, kind, user), db=self._records) != blob:
                    raise superseded(str(self.path))
            new_users = 0
            for kind, user, blob in writes:
                key = record_key(version, kind, user)
                new_users += kind == "tokens" and transaction.get(key, db=self._records) is None
                transaction.put(key, blob, db=self._records)
            self._put_info(transaction, replace(info, num_users=info.num_users + new_users))

        self._write(put)

    def get_many(self, kind: str, user_keys: Sequence[bytes], version: str) -> list[bytes | None]:
        keys = [record_key(version, kind, user) for user in user_keys]  # one transaction: all from one moment

        def get(transaction: lmdb.Transaction) -> list[bytes | None]:
            return [cast("bytes | None", transaction.get(key, db=self._records)) for key in keys]

        return self._read(get)

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

        def part(transaction: lmdb.Transaction) -> list[tuple[bytes, bytes]]:
            with transaction.cursor(db=self._records) as cursor:
                rows = islice(cursor, SCAN_RECORDS) if cursor.set_range(start) else ()
                found = [(bytes(key), bytes(blob)) for key, blob in rows]
            return [(key[len(prefix) :], blob) for key, blob in found if key.startswith(prefix)]

        start = prefix
        while found := self._read(part):
            yield from found
            start = prefix + found[-1][0] + b"\0"  # the first key there can be after it

    # -- versions

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        check_version(version)

        wanted = VersionInfo(version, num_tokens, width, expected_users)
        self._write(lambda t: self._put_info(t, begin(self._info(t, version), wanted, str(self.path))))

    def complete_version(self, version: str) -> None:
        def complete(transaction: lmdb.Transaction) -> None:
            info = self._info(transaction, version)
            if info is None:
                raise not_begun(version, str(self.path))
            self._put_info(transaction, replace(info, is_complete=True))

        self._write(complete)

    def versions(self) -> list[VersionInfo]:
        return self._read(self._all_versions)

    def published(self) -> str | None:
        return self._read(self._pointer).now

    def previous(self) -> str | None:
        return self._read(self._pointer).before

    def publish(self, version: str, force: bool = False) -> None:
        def flip(transaction: lmdb.Transaction) -> None:
            check_publishable(self._info(transaction, version), version, force)
            self._put_pointer(transaction, self._pointer(transaction).flipped(version))

        self._write(flip)

    def rollback(self) -> str:
        def flip(transaction: lmdb.Transaction) -> str:
            known = [info.version for info in self._all_versions(transaction)]
            pointer = self._pointer(transaction).rolled_back(known, str(self.path))
            self._put_pointer(transaction, pointer)
            return cast(str, pointer.now)

        return self._write(flip)

    def drop_version(self, version: str) -> int:
        check_version(version)

        def drop(transaction: lmdb.Transaction) -> int:
            check_droppable(self._pointer(transaction), version)
            removed = 0
            with transaction.cursor(db=self._records) as cursor:
                while cursor.set_range(version.encode()) and bytes(cursor.key()).startswith(version.encode()):
                    removed += cursor.delete()
            transaction.delete(VERSION_PREFIX + version.encode(), db=self._facts)
            return removed

        return self._write(drop)

    def statistics(self) -> list[KindStatistics]:
        return [
            KindStatistics(info.version, kind, num_records, num_bytes)
            for info in self.versions()
            for kind in KINDS
            for num_records, num_bytes in [self._measure(record_key(info.version, kind, b""))]
            if num_records
        ]

    def _measure(self, prefix: bytes) -> tuple[int, int]:
        """Records and bytes of what has keys with a prefix, in parts as a scan; the records' pages are not touched."""
        sizes: list[int] = []

        def part(transaction: lmdb.Transaction) -> tuple[list[int], bytes]:
            with transaction.cursor(db=self._records) as cursor:
                rows = islice(cursor, MEASURE_RECORDS) if cursor.set_range(start) else ()
                found = [(bytes(key), len(blob)) for key, blob in rows]
            own = [size for key, size in found if key.startswith(prefix)]
            return own, found[-1][0] + b"\0" if found and len(own) == len(found) else b""

        start = prefix
        while start:
            own, start = self._read(part, in_place=True)
            sizes += own
        return len(sizes), sum(sizes)

    # -- compaction

    def compact(self) -> int:
        with self._writing:
            before, number = self._num_bytes(), self._number
        try:
            self._write(self._copy)
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be compacted ({error}); it is as it was. It needs as much space again while that "
                "lasts: free some, then run again"
            ) from error
        with self._writing:
            self._follow()
            return max(before - self._num_bytes(), 0) if self._number > number else 0

    def _num_bytes(self) -> int:
        return (self._generations.folder(self._number) / "data.mdb").stat().st_size

    def _copy(self, transaction: lmdb.Transaction) -> None:
        """Copy all records and facts, one by one, to the next generation, and say in this one that the store moves.

        One by one, since pages keep bytes of what was deleted from them or written over.
        """
        self._generations.remove_others(self._number)
        folder = self._generations.folder(self._number + 1)
        folder.mkdir()
        try:
            size = 2 * self._env.info()["map_size"]
            with lmdb.open(str(folder), map_size=size, max_dbs=2, sync=False, create=False) as target:
                for name, source in ((b"records", self._records), (b"facts", self._facts)):
                    database = target.open_db(name)
                    with transaction.cursor(db=source) as cursor:
                        for part in _parts(cursor):
                            with target.begin(write=True) as copy, copy.cursor(db=database) as end:
                                end.putmulti(part, append=True)
                target.sync(True)
            sync(folder)
            sync(self.path)
        except BaseException:
            self._generations.remove_others(self._number)
            raise
        transaction.put(MOVED, b"%d" % (self._number + 1), db=self._facts)

    def _follow(self) -> None:
        """Go over to the generation the store has moved to. For who holds the lock of writers of this process."""
        with self._readers.kept_out():
            if self._newer() is not None:  # else another thread was first
                self._env.close()
                self._open()

    # -- below

    def _write(self, action: Callable[[lmdb.Transaction], Result]) -> Result:
        """Run an action in one transaction, with a larger map if it does not fit."""
        try:
            with self._writing:
                while True:
                    try:
                        return self._attempt(action)
                    except lmdb.MapFullError:
                        self._set_map(self._env.info()["map_size"] * 2)
                    except lmdb.MapResizedError:
                        self._set_map(0)  # take over the size another process has set
                    except _Moved:
                        self._follow()
        except lmdb.Error as error:
            raise StoreError(
                f"{self.path}: cannot be written ({error}); nothing of this write was kept. "
                "Free space or check permissions, then run again"
            ) from error

    def _attempt(self, action: Callable[[lmdb.Transaction], Result]) -> Result:
        transaction = self._env.begin(write=True)
        try:
            self._check_not_moved(transaction)
            result = action(transaction)
            transaction.commit()
        except BaseException:
            with self._readers.kept_out():
                transaction.abort()
            raise
        return result

    def _read(self, action: Callable[[lmdb.Transaction], Result], in_place: bool = False) -> Result:
        """Run an action that sees the store as of one moment. in_place: values are views, gone when the action ends."""
        try:
            while True:
                try:
                    with self._readers.one(), self._begin(in_place) as transaction:
                        self._check_not_moved(transaction)
                        return action(transaction)
                except lmdb.MapResizedError:
                    with self._writing:
                        self._set_map(0)
                except _Moved:
                    with self._writing:
                        self._follow()
        except lmdb.Error as error:
            raise StoreError(
                f"{self.path}: cannot be read ({error}); if the file is damaged, move it away and run vista summarize"
            ) from error

    def _check_not_moved(self, transaction: lmdb.Transaction) -> None:
        if transaction.get(MOVED, db=self._facts) is not None:
            raise _Moved

    def _begin(self, in_place: bool) -> lmdb.Transaction:
        return cast(lmdb.Transaction, self._env.begin(buffers=True)) if in_place else self._env.begin()

    def _set_map(self, num_bytes: int) -> None:
        with self._readers.kept_out():
            self._env.set_mapsize(num_bytes)

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

    def _pointer(self, transaction: lmdb.Transaction) -> Pointer:
        value = transaction.get(POINTER, db=self._facts)
        return Pointer() if value is None else Pointer(**json.loads(bytes(value)))

    def _put_pointer(self, transaction: lmdb.Transaction, pointer: Pointer) -> None:
        transaction.put(POINTER, json.dumps(pointer.to_json()).encode(), db=self._facts)

    def close(self) -> None:
        with self._writing, self._readers.kept_out():
            self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Readers:
    """The threads that read now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside, self._is_open = 0, True

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """When the last one has left, and until this ends. Only for who holds the lock of writers."""
        with self._changed:
            self._is_open = False
            try:
                self._changed.wait_for(lambda: not self._num_inside)
                yield
            finally:
                self._is_open = True
                self._changed.notify_all()


def _parts(cursor: lmdb.Cursor) -> Iterator[list[tuple[bytes, bytes]]]:
    """All entries of a database in order, about COPY_BYTES at a time."""
    part, num_bytes = [], 0
    for key, value in cursor:
        part.append((bytes(key), bytes(value)))
        num_bytes += len(key) + len(value)
        if num_bytes >= COPY_BYTES:
            yield part
            part, num_bytes = [], 0
    yield part


def record_key(version: str, kind: str, user_key: bytes) -> bytes:
    """version | kind | user key. Raises StoreError for what cannot be one of these."""
    check_version(version)
    return version.encode() + member(kind, user_key)
