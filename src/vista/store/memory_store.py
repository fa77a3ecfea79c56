"""The engine within a process: what is stored under a name lasts until the process ends. For tests and examples."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, cast

from vista.errors import StoreError
from vista.store.contract import KindStatistics, Provided, Write
from vista.store.record import KINDS
from vista.store.versions import (
    Pointer,
    VersionInfo,
    begin,
    begun,
    check_droppable,
    check_publishable,
    check_version,
    member,
    superseded,
)


@dataclass
class _Contents:
    """All that is stored under one name. records: by version, then by kind and user key (``member``)."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    known: dict[str, VersionInfo] = field(default_factory=dict)
    records: dict[str, dict[bytes, bytes]] = field(default_factory=dict)
    pointer: Pointer = field(default_factory=Pointer)


_STORES: dict[str, _Contents] = {}
_STORES_LOCK = threading.Lock()


class MemoryStore:
    """Implements ``SummaryStore``. Two stores of one name in one process hold the same."""

    def __init__(self, name: str, read_only: bool = False) -> None:
        self.name, self._read_only, self._is_open = f"memory:{name}", read_only, True
        with _STORES_LOCK:
            if read_only and name not in _STORES:
                raise StoreError(f"{self.name}: there is no store in this process; open it for writing first")
            self._contents = _STORES.setdefault(name, _Contents())

    @contextmanager
    def _reading(self) -> Iterator[_Contents]:
        if not self._is_open:
            raise StoreError(f"{self.name}: cannot be read (it was closed); open it again")
        with self._contents.lock:
            yield self._contents

    @contextmanager
    def _writing(self) -> Iterator[_Contents]:
        """Whoever writes checks first and changes then, so that a failure changes nothing."""
        if not self._is_open or self._read_only:
            reason = "it was opened to be read only" if self._is_open else "it was closed"
            raise StoreError(f"{self.name}: cannot be written ({reason}); open it again, for writing")
        with self._contents.lock:
            yield self._contents

    # -- records

    def commit(self, writes: Sequence[Write], version: str, provided: Sequence[Provided] = ()) -> None:
        new = {member(kind, user): bytes(blob) for kind, user, blob in writes}
        with self._writing() as contents:
            begun(contents.known, version, self.name)
            own = contents.records[version]
            if any(own.get(member(kind, user)) != blob for kind, user, blob in provided):
                raise superseded(self.name)
            own |= new

    def get_many(self, kind: str, user_keys: Sequence[bytes], version: str) -> list[bytes | None]:
        check_version(version)
        members = [member(kind, user) for user in user_keys]
        with self._reading() as contents:
            own = contents.records.get(version, {})
            return [own.get(name) for name in members]

    def delete(self, user_key: bytes, version: str | None = None) -> int:
        with self._writing() as contents:
            chosen = [own for name, own in contents.records.items() if version in (None, name)]
            return sum(own.pop(member(kind, user_key), None) is not None for own in chosen for kind in KINDS)

    def scan(self, kind: str, version: str) -> Iterator[tuple[bytes, bytes]]:
        check_version(version)
        prefix = member(kind, b"")
        with self._reading() as contents:
            rows = [row for row in contents.records.get(version, {}).items() if row[0].startswith(prefix)]
        for name, blob in sorted(rows):
            yield name[len(prefix) :], blob

    # -- versions

    def begin_version(self, version: str, num_tokens: int, width: int, expected_users: int) -> None:
        check_version(version)
        wanted = VersionInfo(version, num_tokens, width, expected_users)
        with self._writing() as contents:
            contents.known[version] = begin(contents.known.get(version), wanted, self.name)
            contents.records.setdefault(version, {})

    def complete_version(self, version: str) -> None:
        with self._writing() as contents:
            contents.known[version] = replace(begun(contents.known, version, self.name), is_complete=True)

    def versions(self) -> list[VersionInfo]:
        with self._reading() as contents:
            return _counted(contents)

    def published(self) -> str | None:
        with self._reading() as contents:
            return contents.pointer.now

    def previous(self) -> str | None:
        with self._reading() as contents:
            return contents.pointer.before

    def publish(self, version: str, force: bool = False) -> None:
        with self._writing() as contents:
            info = next((info for info in _counted(contents) if info.version == version), None)
            check_publishable(info, version, force)
            contents.pointer = contents.pointer.flipped(version)

    def rollback(self) -> str:
        with self._writing() as contents:
            contents.pointer = contents.pointer.rolled_back(contents.known, self.name)
            return cast(str, contents.pointer.now)

    def drop_version(self, version: str) -> int:
        check_version(version)
        with self._writing() as contents:
            check_droppable(contents.pointer, version)
            contents.known.pop(version, None)
            return len(contents.records.pop(version, {}))

    def statistics(self) -> list[KindStatistics]:
        with self._reading() as contents:
            rows = [
                (info.version, kind, [len(blob) for name, blob in own.items() if name.startswith(member(kind, b""))])
                for info in _counted(contents)
                for own in [contents.records[info.version]]
                for kind in KINDS
            ]
        return [KindStatistics(version, kind, len(sizes), sum(sizes)) for version, kind, sizes in rows if sizes]

    def compact(self) -> int:
        with self._writing():
            return 0  # there are no files

    def close(self) -> None:
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _counted(contents: _Contents) -> list[VersionInfo]:
    """All versions with their numbers of users, oldest first."""
    tokens = member("tokens", b"")
    counted = (
        replace(info, num_users=sum(name.startswith(tokens) for name in contents.records[version]))
        for version, info in contents.known.items()
    )
    return sorted(counted, key=lambda info: info.created_us)
