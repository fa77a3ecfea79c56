"""Entries of a log to events: one JSON object each, as docs/stream.md has it.

    {"user_id": 7, "item_id": "a1", "timestamp": 1700000000, "action": "buy", "event_id": "e-1"}

Nothing here raises for what an entry holds: an entry that is no event comes back with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from vista.data.events import LARGEST_SECONDS
from vista.jobs.deliver import Delivery
from vista.jobs.sources.contract import LONGEST_VALUE, Entry
from vista.updates.apply import NewEvents

LARGEST_INTEGER = 2**63 - 1
LONGEST_ID_BYTES = 1024  # as a server takes them
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FACTORS = ((LARGEST_SECONDS, 1_000_000), (LARGEST_SECONDS * 1000, 1_000), (LARGEST_SECONDS * 1_000_000, 1))


class NoEvent(Exception):
    """Why an entry is no event."""


@dataclass(frozen=True)
class Parsed:
    """delivery: the events; entries: theirs, in the same order; bad: the entries that are none, each with the reason;
    num_passed: events before ``since_us``, by partition."""

    delivery: Delivery
    entries: list[Entry]
    bad: list[tuple[Entry, str]]
    num_passed: dict[int, int]


def parse(entries: Sequence[Entry], log: str, since_us: int = 0) -> Parsed:
    """The events of some entries. since_us: pass over what is older."""
    good: list[Entry] = []
    rows: list[tuple[Any, ...]] = []
    bad: list[tuple[Entry, str]] = []
    num_passed: dict[int, int] = {}
    for entry in entries:
        try:
            row = event_of(entry.value)
        except NoEvent as reason:
            bad.append((entry, str(reason)))
            continue
        if row[2] < since_us:
            num_passed[entry.partition] = num_passed.get(entry.partition, 0) + 1
            continue
        good.append(entry)
        rows.append(row)
    user, item, time_us, action, event_id = zip(*rows, strict=True) if rows else ((),) * 5
    events = NewEvents(user, item, np.array(time_us, np.int64), action, event_id)
    columns = (np.array([getattr(e, name) for e in good], np.int64) for name in ("partition", "offset", "arrived_us"))
    return Parsed(Delivery(events, log, *columns), good, bad, num_passed)


def event_of(value: bytes) -> tuple[Any, Any, int, Any, Any]:
    """User id, item id, time (us), action and event id of an entry. Raises NoEvent with the reason."""
    if len(value) > LONGEST_VALUE:
        raise NoEvent(f"longer than {LONGEST_VALUE} bytes")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise NoEvent(f"not JSON: {error}"[:200]) from None
    if not isinstance(found, dict):
        raise NoEvent(f"not a JSON object but {type(found).__name__}")
    user, item = (_id(found, name) for name in ("user_id", "item_id"))
    event_id = None if found.get("event_id") is None else _id(found, "event_id")
    action = found.get("action")
    if not isinstance(action, str | int | float | None):
        raise NoEvent(f"action {_short(action)} is not a string or number")
    return user, item, _time_us(found), action, event_id


def _id(found: dict[str, Any], name: str) -> Any:
    value = found.get(name)
    is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    if not is_integer and not (isinstance(value, str) and value):
        raise NoEvent(f"no {name}" if value is None else f"{name} {_short(value)} is not an integer or a string")
    if isinstance(value, str) and not _is_text(value):
        raise NoEvent(f"{name} {_short(value)} is not Unicode text")
    if isinstance(value, str) and len(value.encode()) > LONGEST_ID_BYTES:
        raise NoEvent(f"{name} {_short(value)} is longer than {LONGEST_ID_BYTES} bytes")
    return value


def _is_text(value: str) -> bool:
    """Without half characters, which JSON can spell but nothing can store."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _time_us(found: dict[str, Any]) -> int:
    """``timestamp_us``, an integer; or ``timestamp``: s, ms or us by its magnitude, or text in ISO 8601."""
    exact, value = found.get("timestamp_us"), found.get("timestamp")
    if exact is not None:
        if isinstance(exact, bool) or not isinstance(exact, int) or abs(exact) > LARGEST_INTEGER:
            raise NoEvent(f"timestamp_us {_short(exact)} is not an integer")
        return exact
    if value is None:
        raise NoEvent("no timestamp")
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise NoEvent(f"timestamp {_short(value)} is not a time in ISO 8601") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return (moment - EPOCH) // timedelta(microseconds=1)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise NoEvent(f"timestamp {_short(value)} is not a time")
    factor = next((factor for largest, factor in FACTORS if abs(value) < largest), None)
    if factor is None:
        raise NoEvent(f"timestamp {_short(value)} is not in seconds, milli- or microseconds")
    return round(value * factor)


def _short(value: Any) -> str:
    return repr(value)[:60]
