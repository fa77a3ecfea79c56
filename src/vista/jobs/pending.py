"""Users whose states are ahead of their tokens, and when the tokens are due."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from vista.errors import ConfigError
from vista.store.record import user_key


@dataclass(frozen=True)
class Cadence:
    """A user's tokens are written after ``events`` new events, or ``seconds`` after the first one; None: not by that.

    Raises ConfigError where neither is given, and for values that are out of range.
    """

    events: int | None = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.events is None and self.seconds is None:
            raise ConfigError("tokens would never be written: give a number of events or seconds")
        if self.events is not None and self.events < 1:
            raise ConfigError(f"tokens after {self.events} events: give 1 or more")
        if self.seconds is not None and not 0 <= self.seconds < 1e9:
            raise ConfigError(f"tokens after {self.seconds} seconds: give 0 or more")

    @property
    def most_unread(self) -> float:
        """How many events of a user a stored tokens record may lack: at most, once a micro-batch is in."""
        if self.seconds == 0:
            return 0
        return float("inf") if self.events is None else self.events - 1

    @classmethod
    def parse(cls, texts: list[str]) -> Cadence:
        """``events=100``, ``seconds=30``, or both, whichever comes first. Raises ConfigError."""
        found: dict[str, Any] = {"events": None}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                found[name] = {"events": int, "seconds": float}[name](value)
            except (KeyError, ValueError):
                raise ConfigError(f"--refresh-after {text!r}: write events=N or seconds=X") from None
        return cls(**found) if texts else cls()


@dataclass
class Waiting:
    """One user. first: per partition the offset of the first event that the tokens do not have; since_s: by the
    monotonic clock; arrived_us, event_us: the oldest arrival and the oldest time of these events."""

    user_id: Any
    since_s: float
    arrived_us: int
    event_us: int
    num_events: int = 0
    first: dict[int, int] = field(default_factory=dict)


class Pending:
    """The users that wait. Everything is in order of waiting, so that who is first is known without a search."""

    def __init__(self, cadence: Cadence) -> None:
        self._cadence = cadence
        self._users: dict[bytes, Waiting] = {}
        self._by_partition: dict[int, dict[bytes, int]] = {}
        self._full: dict[bytes, None] = {}  # those that have events enough

    def __len__(self) -> int:
        return len(self._users)

    def add(self, user_id: Any, partition: int, offset: int, arrived_us: int, event_us: int, now_s: float) -> None:
        """One more event of a user; events of a partition in order of their offsets."""
        key = user_key(user_id)
        own = self._users.setdefault(key, Waiting(user_id, now_s, arrived_us, event_us))
        own.num_events += 1
        own.arrived_us, own.event_us = min(own.arrived_us, arrived_us), min(own.event_us, event_us)
        if partition not in own.first:
            own.first[partition] = offset
            self._by_partition.setdefault(partition, {})[key] = offset
        if self._cadence.events is not None and own.num_events >= self._cadence.events:
            self._full[key] = None

    def is_due(self, user_id: Any, num_more: int, now_s: float) -> bool:
        """Whether a user's tokens are due once ``num_more`` events have come."""
        own = self._users.get(user_key(user_id))
        num_events = num_more + (own.num_events if own is not None else 0)
        by_events = self._cadence.events is not None and num_events >= self._cadence.events
        return by_events or self._is_over(now_s if own is None else own.since_s, now_s)

    def _is_over(self, since_s: float, now_s: float) -> bool:
        return self._cadence.seconds is not None and now_s - since_s >= self._cadence.seconds

    def due(self, now_s: float, number: int) -> list[Any]:
        """At most so many of the users whose tokens are due."""
        full = [self._users[key].user_id for key in islice(self._full, number)]
        waited = takewhile(lambda own: self._is_over(own.since_s, now_s), self._users.values())
        others = (own.user_id for own in waited if user_key(own.user_id) not in self._full)
        return [*full, *islice(others, number - len(full))]

    def some(self, number: int) -> list[Any]:
        """So many of the users that wait, or all."""
        return [own.user_id for own in islice(self._users.values(), number)]

    def written(self, user_id: Any) -> Waiting | None:
        """A user waits no longer; what it was that waited."""
        key = user_key(user_id)
        own = self._users.pop(key, None)
        self._full.pop(key, None)
        for partition in own.first if own is not None else ():
            del self._by_partition[partition][key]
        return own

    def first_offset(self, partition: int, next_offset: int) -> int:
        """Of the oldest event that no tokens have yet; next_offset where there is none."""
        return next(iter(self._by_partition.get(partition, {}).values()), next_offset)
