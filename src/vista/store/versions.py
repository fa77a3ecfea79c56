"""The rules of model versions and of publishing, the same in every engine; an engine keeps what comes out of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace

from vista.errors import StoreError, Superseded
from vista.store.record import KINDS, LONGEST_KEY, VERSION_BYTES

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

    @property
    def is_covered(self) -> bool:
        """Whether it holds as many of the expected users as publishing asks for."""
        return self.num_users >= LEAST_COVERAGE * self.expected_users

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Pointer:
    """The published version, and the one before it, which a rollback publishes again."""

    now: str | None = None
    before: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return {"now": self.now, "before": self.before}

    def flipped(self, version: str) -> Pointer:
        """To another version; publishing once more what is published changes nothing."""
        return self if version == self.now else Pointer(version, self.now)

    def rolled_back(self, known: Collection[str], place: str) -> Pointer:
        """Both change places, so that a second rollback undoes the first. Raises StoreError if there is none before."""
        if self.before is None or self.before not in known:
            raise StoreError(f"{place}: no version was published before {self.now}; nothing to roll back to")
        return Pointer(self.before, self.now)


def begin(known: VersionInfo | None, wanted: VersionInfo, place: str) -> VersionInfo:
    """A version as a bulk run begins it or goes on with it: not complete. Raises StoreError for another K or D."""
    if known is None:
        return replace(wanted, created_us=time.time_ns() // 1000)
    if (known.num_tokens, known.width) != (wanted.num_tokens, wanted.width):
        raise StoreError(
            f"version {wanted.version} in {place} has {known.num_tokens} x {known.width} tokens, "
            f"not {wanted.num_tokens} x {wanted.width}"
        )
    return replace(known, expected_users=wanted.expected_users, is_complete=False)


def begun(known: Mapping[str, VersionInfo], version: str, place: str) -> VersionInfo:
    """What is known of a version. Raises StoreError if it was not begun."""
    if version not in known:
        raise not_begun(version, place)
    return known[version]


def not_begun(version: str, place: str) -> StoreError:
    return StoreError(f"version {version} was not begun in {place}; call begin_version first")


def superseded(place: str) -> Superseded:
    return Superseded(f"{place}: another process has changed the records that a write was made for; it was not done")


def check_publishable(info: VersionInfo | None, version: str, force: bool) -> None:
    """Refuse to publish what is not there, not complete, or covers too few of the expected users."""
    if info is None:
        raise StoreError(f"version {version} is not in the store; run: vista summarize")
    if not force and not (info.is_complete and info.is_covered):
        raise StoreError(
            f"version {version} holds {info.num_users} of {info.expected_users} users"
            f"{'' if info.is_complete else ' and its bulk run has not ended'}; finish it with vista summarize, or force"
        )


def check_droppable(pointer: Pointer, version: str) -> None:
    """Refuse to drop what readers use, or would use after a rollback."""
    if version in (pointer.now, pointer.before):
        raise StoreError(f"version {version} is published or the one to roll back to; publish another first")


def check_version(version: str) -> None:
    """Raise StoreError for what cannot be a model version: one that is the beginning of another would own its keys."""
    if len(version.encode()) != VERSION_BYTES:
        raise StoreError(f"version {version!r}: a model version has {VERSION_BYTES} bytes; it is in the run's folder")


def member(kind: str, user_key: bytes) -> bytes:
    """kind (1 byte) | user key: the name of a record within its version. Raises StoreError for what cannot be one."""
    if kind not in KINDS or len(user_key) > LONGEST_KEY:
        raise StoreError(
            f"kind {kind!r}, user key of {len(user_key)} bytes: known kinds are {KINDS}, a key has at most "
            f"{LONGEST_KEY} bytes; make it with user_key"
        )
    return bytes([KINDS.index(kind)]) + user_key
