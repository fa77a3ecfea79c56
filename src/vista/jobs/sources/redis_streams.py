"""A log in Redis or Valkey Streams: one stream per partition, read by offset, with a consumer group as the ledger.

    redis://host/0?stream=events              the stream ``events``, as partition 0
    redis://host/0?stream=events&partitions=4 the streams ``events:0`` to ``events:3``
    ...&group=G                               the consumer group, ``vista`` without

An entry's offset is its id as one number (`offset_of`). Its value is the field ``event``, a JSON object; without such a
field, the entry's fields are the object.

Reading goes by offset (XRANGE), since the truth about what was taken in is beside the states. The group says so on the
server: its last delivered id follows what was acknowledged, so XINFO GROUPS shows the lag, and whoever trims the stream
knows up to where. What other consumers of the group have left pending, say one that crashed, is claimed and read as all
else, and acknowledged once it is in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from vista.errors import SourceError, StoreError
from vista.jobs.sources.contract import Backlog, Entry, PolledSource
from vista.store.contract import shown
from vista.store.redis_client import connect

SEQUENCE_BITS = 20  # of an offset: a million entries in one millisecond; the time takes 43 bits until the year 2248
FIELD = b"event"
GROUP, CONSUMER = "vista", "vista"
OPTIONS = ("stream", "group", "partitions")
PENDING_AT_ONCE = 1000
# KEYS: a stream; ARGV: first id, last id (both counted). Counts on the server: nothing is sent.
COUNT = """
local from, total = ARGV[1], 0
while true do
  local page = redis.call('XRANGE', KEYS[1], from, ARGV[2], 'COUNT', 1000)
  total = total + #page
  if #page < 1000 then return total end
  from = '(' .. page[#page][1]
end
"""


def offset_of(entry_id: bytes | str) -> int:
    """An id ``milliseconds-sequence`` as a number of the same order. Raises SourceError for one too large."""
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    milliseconds, _, sequence = text.partition("-")
    if int(sequence) >> SEQUENCE_BITS or int(milliseconds) >> (63 - SEQUENCE_BITS):
        raise SourceError(f"stream entry {text}: an id is a time and at most {2**SEQUENCE_BITS} entries of it")
    return int(milliseconds) << SEQUENCE_BITS | int(sequence)


def id_of(offset: int) -> str:
    """The id at an offset."""
    return f"{offset >> SEQUENCE_BITS}-{offset & (2**SEQUENCE_BITS - 1)}"


class RedisSource(PolledSource):
    """Implements ``EventSource``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        stream, num = options.get("stream"), options.get("partitions")
        if not stream or not (num is None or (num.isdecimal() and int(num) > 0)):
            raise SourceError(
                f"source {shown(url)}: write redis://HOST[:PORT][/DB]?stream=NAME[&partitions=N][&group=G]"
            )
        self.name, self._group = f"redis:{stream}", options.get("group") or GROUP
        self._keys = {n: f"{stream}:{n}" for n in range(int(num))} if num else {0: stream}
        rest = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key not in OPTIONS])
        self._url = urlunsplit(parts._replace(query=rest))
        try:
            self._client, is_cluster = connect(self._url)
        except StoreError as error:
            raise SourceError(f"source {error}") from error
        if is_cluster:
            raise SourceError(f"source {shown(url)}: a cluster; name one server with the stream")
        super().__init__()
        self._backlogs: dict[int, Backlog] = {}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from redis import RedisError

        try:
            yield
        except (RedisError, OSError) as error:
            raise SourceError(
                f"{shown(self._url)}, {self.name}: cannot be read ({error}); is the server up, and is it a stream?"
            ) from error

    def partitions(self) -> list[int]:
        return list(self._keys)

    def start(self, offsets: Mapping[int, int]) -> None:
        unknown = sorted(set(offsets) - set(self._keys))
        if unknown:
            raise SourceError(f"{self.name}: there is no partition {unknown[0]}; there are {list(self._keys)}")
        self._next = dict(offsets)
        with self._errors():
            for number, offset in offsets.items():
                self._make_group(self._keys[number])
                self._check_offset(self._keys[number], offset)
                self._claim(self._keys[number])

    def _check_offset(self, key: str, offset: int) -> None:
        """Raise SourceError where a stream never had the entry before an offset: it is another one of that name."""
        newest = offset_of(self._client.xinfo_stream(key)["last-generated-id"])
        if offset > newest + 1:
            raise SourceError(
                f"{self.name}: the stream {key!r} was read up to {id_of(offset - 1)}, and its newest entry ever was "
                f"{id_of(newest)}: it is another stream; name another log with --log, or bring the old one back"
            )

    def _make_group(self, key: str) -> None:
        from redis.exceptions import ResponseError

        try:
            self._client.xgroup_create(key, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _claim(self, key: str) -> None:
        """Take over what any consumer of the group left pending; entries that were deleted leave the ledger."""
        start: Any = "0-0"
        while True:
            start, *_ = self._client.xautoclaim(
                key, self._group, CONSUMER, min_idle_time=0, start_id=start, count=PENDING_AT_ONCE, justid=False
            )
            if start in (b"0-0", "0-0"):
                return

    def _entries(self, number: int, offset: int, max_entries: int) -> list[Entry]:
        with self._errors():
            rows = self._client.xrange(self._keys[number], min=id_of(offset), count=max_entries)
        found = []
        for entry_id, fields in rows:
            at = offset_of(entry_id)
            found.append(Entry(number, at, at + 1, _value(fields), (at >> SEQUENCE_BITS) * 1000))
        return found

    def ends(self) -> dict[int, int]:
        with self._errors():
            newest = {n: self._client.xrevrange(key, count=1) for n, key in self._keys.items()}
        return {number: offset_of(rows[0][0]) + 1 if rows else 0 for number, rows in newest.items()}

    def num_behind(self, offsets: Mapping[int, int]) -> dict[int, int]:
        ends, counts = self.ends(), {}
        for number, offset in offsets.items():
            backlog = self._backlogs.setdefault(number, Backlog(lambda a, b, n=number: self._count(n, a, b)))  # type: ignore[misc]
            counts[number] = backlog.behind(offset, ends[number])
        return counts

    def _count(self, number: int, start: int, end: int) -> int:
        if start >= end:
            return 0
        with self._errors():
            return int(self._client.eval(COUNT, 1, self._keys[number], id_of(start), id_of(end - 1)))

    def peek(self, partition: int, offset: int) -> Entry | None:
        with self._errors():
            return next(iter(self._entries(partition, offset, 1)), None)

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        with self._errors():
            for number, offset in offsets.items():
                key = self._keys[number]
                if offset:
                    self._client.xgroup_setid(key, self._group, id_of(offset - 1))
                    self._acknowledge_pending(key, offset)

    def _acknowledge_pending(self, key: str, offset: int) -> None:
        """Take what others had left pending from the ledger, as far as it is in."""
        while rows := self._client.xpending_range(key, self._group, "-", id_of(offset - 1), PENDING_AT_ONCE):
            self._client.xack(key, self._group, *(row["message_id"] for row in rows))

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _value(fields: dict[bytes, bytes]) -> bytes:
    if FIELD in fields:
        return fields[FIELD]
    text = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in fields.items()}
    if text.get("timestamp_us", "").lstrip("-").isdecimal():
        return json.dumps(text | {"timestamp_us": int(text["timestamp_us"])}).encode()
    try:
        return json.dumps(text | {"timestamp": float(text["timestamp"])}).encode()
    except (KeyError, ValueError):  # ISO 8601, or none
        return json.dumps(text).encode()
