"""JSON bodies to what is asked, checked to the last value. A wrong one is a ``RequestError`` that says where."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

from vista.errors import RequestError, nearest
from vista.serving.options import Limits

LONGEST_ID_BYTES = 1024
LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = 3.4e38  # of a context value: within float32
LATEST_US = 253_402_300_799_999_999  # the end of the year 9999
MAX_K = 1000  # items recommended at once
MAX_USERS_LISTED, MAX_EVENTS_SHOWN, MAX_EVENTS_OF_TOKEN = 100, 1000, 50  # in one answer
TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_EXPLAINED = 100  # candidates explained at once: the answer has a weight per candidate, token and recent event
DIGITS = 19  # of an integer of 64 bits
SHOWN = 60  # characters of a value in a message
LONGEST_AT = 60  # characters of a time: any form of ISO 8601 is shorter


@dataclass(frozen=True)
class RankAsk:
    """at_us: microseconds since 1970 UTC; context: as it came, read by the model that answers."""

    user: Any
    candidates: list[Any]
    at_us: int
    context: Any = None


@dataclass(frozen=True)
class PostedEvent:
    user: Any
    item: Any
    at_us: int
    action: Any = None
    event_id: Any = None


@dataclass(frozen=True)
class Filters:
    """Which items may be recommended. category: per feature of the catalogue the values that are wanted."""

    exclude_seen: bool = False
    exclude: list[Any] = field(default_factory=list)
    category: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecommendAsk:
    user: Any
    k: int
    at_us: int
    filters: Filters


def parse_json(body: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no name twice in an object, no NaN or Infinity. Raises RequestError."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"body: byte {error.start} is not UTF-8; send JSON as UTF-8") from error
    except RecursionError as error:
        raise RequestError("body: nested too deeply; no request needs more than four levels") from error
    except ValueError as error:
        raise RequestError(f"body: not JSON ({error}); send a JSON object") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RequestError(f"body: the name {shown(name)} stands twice in one object; leave one out")
            seen.add(name)
    return found


def _no_constant(name: str) -> NoReturn:
    raise RequestError(f"body: {name} is not JSON; leave the value out, or send null")


def rank_ask(body: bytes, limits: Limits) -> RankAsk:
    """Raises RequestError."""
    given = fields_of(parse_json(body), ("user", "candidates"), ("at", "context"))
    candidates = given["candidates"]
    if not isinstance(candidates, list) or not candidates:
        raise RequestError(f"candidates is {shown(candidates)}; give a list of at least one item id")
    check_number(len(candidates), limits.max_candidates, "candidates")
    check_ids(candidates, "candidates")
    return RankAsk(read_id(given["user"], "user"), candidates, read_at(given.get("at"), "at"), given.get("context"))


def explain_ask(body: bytes, limits: Limits) -> RankAsk:
    """A ranking to be explained: as of ``rank_ask``, with fewer candidates. Raises RequestError."""
    ask = rank_ask(body, limits)
    check_number(len(ask.candidates), MAX_EXPLAINED, "candidates to explain")
    return ask


def read_number(given: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A parameter of a URL: an integer from 0 to ``most``. Raises RequestError."""
    text = given.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS and int(text) <= most):
        raise RequestError(f"{name} is {shown(text)}; give an integer from 0 to {most}")
    return int(text)


def check_parameters(given: Iterable[tuple[str, str]], names: tuple[str, ...]) -> None:
    """Raise RequestError for a parameter of a URL that is not there, or stands twice. given: names and values."""
    seen: set[str] = set()
    for name, _ in given:
        if name not in names:
            raise RequestError(f"there is no parameter {shown(name)} in this URL{nearest(name[:SHOWN], names)}")
        if name in seen:
            raise RequestError(f"the parameter {name} stands twice in this URL; leave one out")
        seen.add(name)


def events_ask(body: bytes, limits: Limits) -> list[PostedEvent]:
    """Raises RequestError."""
    events = fields_of(parse_json(body), ("events",), ())["events"]
    if not isinstance(events, list) or not events:
        raise RequestError(f"events is {shown(events)}; give a list of at least one event")
    check_number(len(events), limits.max_events, "events")
    return [_event(event, f"events[{place}]") for place, event in enumerate(events)]


def _event(given: Any, place: str) -> PostedEvent:
    found = fields_of(given, ("user", "item", "at"), ("action", "event_id"), place)
    if found["at"] is None:
        raise RequestError(f"{place}.at is null; give the time of the event")
    event_id = None if found.get("event_id") is None else read_id(found["event_id"], f"{place}.event_id")
    action = found.get("action")
    if action is not None and not isinstance(action, bool | float):  # a log may have either, and so a run
        action = read_id(action, f"{place}.action")
    user, item = (read_id(found[name], f"{place}.{name}") for name in ("user", "item"))
    return PostedEvent(user, item, read_at(found["at"], f"{place}.at"), action, event_id)


def recommend_ask(body: bytes, limits: Limits) -> RecommendAsk:
    """Raises RequestError."""
    given = fields_of(parse_json(body), ("user", "k"), ("at", "filters"))
    k = given["k"]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_K:
        raise RequestError(f"k is {shown(k)}; give an integer from 1 to {MAX_K}")
    filters = _filters({} if given.get("filters") is None else given["filters"], limits)
    return RecommendAsk(read_id(given["user"], "user"), k, read_at(given.get("at"), "at"), filters)


def _filters(given: Any, limits: Limits) -> Filters:
    found = fields_of(given, (), ("exclude_seen", "exclude", "category"), "filters")
    exclude_seen, exclude, category = (
        default if found.get(name) is None else found[name]
        for name, default in (("exclude_seen", False), ("exclude", []), ("category", {}))
    )
    if not isinstance(exclude_seen, bool):
        raise RequestError(f"filters.exclude_seen is {shown(exclude_seen)}; give true or false")
    if not isinstance(exclude, list):
        raise RequestError(f"filters.exclude is {shown(exclude)}; give a list of item ids")
    check_number(len(exclude), limits.max_candidates, "items in filters.exclude")
    check_ids(exclude, "filters.exclude")
    if not isinstance(category, dict):
        raise RequestError(f"filters.category is {shown(category)}; give an object, a list of values per feature")
    for name, values in category.items():
        if not isinstance(values, list) or not values:
            raise RequestError(f"filters.category, {shown(name)}: {shown(values)}; give a list of values")
        check_number(len(values), limits.max_candidates, f"values in filters.category, {shown(name)}")
        check_ids(values, f"filters.category, {shown(name)}")
    return Filters(exclude_seen, exclude, category)


def fields_of(given: Any, required: tuple[str, ...], optional: tuple[str, ...], place: str = "body") -> dict[str, Any]:
    """An object with the names it must have, and none it may not. Raises RequestError."""
    names = required + optional
    if not isinstance(given, dict):
        raise RequestError(f"{place} is {shown(given)}; give an object with {', '.join(names)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise RequestError(f"{place}: {missing[0]} is missing; give an object with {', '.join(names)}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise RequestError(f"{place}: there is no field {shown(unknown[0])}{nearest(unknown[0][:SHOWN], names)}")
    return given


def read_id(value: Any, place: str) -> Any:
    """An id: an integer of 64 bits, or a string of 1 to LONGEST_ID_BYTES bytes. Raises RequestError."""
    check_ids([value], place)
    return value


def check_ids(values: list[Any], place: str) -> None:
    """Raise RequestError for the first of some values that is no id. Looks at each only where something is wrong."""
    kinds = set(map(type, values))
    if kinds <= {int, str} and all(_are_fine(values, kind) for kind in kinds):
        return
    for number, value in enumerate(values):
        if type(value) not in (int, str) or not _are_fine([value], type(value)):
            where = place if len(values) == 1 else f"{place}[{number}]"
            raise RequestError(
                f"{where} is {shown(value)}; an id is an integer of 64 bits, or a string of Unicode characters of 1 to "
                f"{LONGEST_ID_BYTES} bytes"
            )


def _are_fine(values: list[Any], kind: type) -> bool:
    own: list[Any] = [value for value in values if type(value) is kind]
    if kind is int:
        return min(own) >= -LARGEST_INTEGER - 1 and max(own) <= LARGEST_INTEGER
    return min(map(len, own)) > 0 and all(map(is_text, own)) and max(map(_num_bytes, own)) <= LONGEST_ID_BYTES


def _num_bytes(text: str) -> int:
    return len(text.encode())


def is_text(value: Any) -> bool:
    """Whether a value is a string of Unicode characters: JSON can carry half of a surrogate pair, which is none."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def read_at(value: Any, place: str) -> int:
    """A moment: ISO 8601 (UTC where it names no zone), microseconds since 1970 UTC, or null for now."""
    if value is None:
        return time.time_ns() // 1000
    at_us: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        at_us = value
    elif isinstance(value, str) and len(value) <= LONGEST_AT:
        at_us = _iso_us(value)
    if at_us is None or not 0 <= at_us <= LATEST_US:
        raise RequestError(
            f"{place} is {shown(value)}; give a time such as 2026-11-25T10:30:00Z, or integer microseconds since 1970"
        )
    return at_us


def _iso_us(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def iso(at_us: int) -> str | None:
    """A moment in UTC for people; None for -1, no event yet."""
    if at_us < 0:
        return None
    moment = datetime.fromtimestamp(at_us // 1_000_000, UTC).replace(microsecond=at_us % 1_000_000)
    return moment.isoformat().replace("+00:00", "Z")


def check_number(number: int, most: int, what: str) -> None:
    """Raise RequestError for more than the most."""
    if number > most:
        raise RequestError(f"{shown(number)} {what} in one request; the most is {most}: send several requests", 413)


def shown(value: Any) -> str:
    """A value for a message: short, and without what a terminal would act on."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return "a huge integer"
    if isinstance(value, str):
        value = value[: SHOWN + 1]
    text = json.dumps(value, default=str) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
