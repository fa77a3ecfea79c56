"""A log in Kafka, or what speaks its protocol: the partitions and offsets of one topic.

    kafka://broker[:port][,broker...]/topic?group=G     further options go to the client, with _ or . in their names

Partitions are assigned, not balanced: which process reads which is said by ``--partitions``. Offsets are kept beside
the states; they are committed to the group, too, where Kafka's tools look for a lag. A record's value is a JSON object,
its timestamp the time of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from vista.errors import SourceError
from vista.jobs.sources.contract import Entry

TIMEOUT_S = 10.0  # for an answer of the brokers
GROUP = "vista"
QUEUED_KBYTES = 16_384  # read ahead of what is asked for, at most, in each partition


class KafkaSource:
    """Implements ``EventSource``."""

    def __init__(self, url: str, **settings: Any) -> None:
        """settings: of the client, beside those of the URL."""
        parts = urlsplit(url)
        self._topic, options = parts.path.strip("/"), dict(parse_qsl(parts.query))
        if not parts.netloc or not self._topic or "/" in self._topic:
            raise SourceError(f"source {url}: write kafka://BROKER[:PORT][,BROKER...]/TOPIC[?group=G]")
        try:
            import confluent_kafka
        except ImportError as error:
            raise SourceError(
                f"source {url}: the package confluent-kafka is not installed; run: pip install 'vista-recsys[kafka]'"
            ) from error
        self._kafka = confluent_kafka
        self.name, self._brokers = f"kafka:{self._topic}", parts.netloc
        self._next: dict[int, int] = {}
        named = {key.replace("_", "."): value for key, value in options.items() if key != "group"}
        self._config = {
            "bootstrap.servers": parts.netloc, "group.id": options.get("group") or GROUP, "enable.auto.commit": False,
            "enable.auto.offset.store": False, "auto.offset.reset": "error",
            "queued.max.messages.kbytes": QUEUED_KBYTES, **named, **settings,
        }  # fmt: skip
        with self._errors():
            self._consumer = confluent_kafka.Consumer(self._config)
        self.partitions()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._kafka.KafkaException, ValueError, TypeError) as error:
            raise SourceError(
                f"{self.name} at {self._brokers}: cannot be read ({_text(error)}); check brokers, topic and options"
            ) from error

    def partitions(self) -> list[int]:
        with self._errors():
            topic = self._consumer.list_topics(self._topic, timeout=TIMEOUT_S).topics[self._topic]
            if topic.error is not None:
                raise self._kafka.KafkaException(topic.error)
        return sorted(topic.partitions)

    def start(self, offsets: Mapping[int, int]) -> None:
        there = self.partitions()
        for number, offset in offsets.items():
            if number not in there:
                raise SourceError(f"{self.name}: there is no partition {number}; there are {there}")
            low, high = self._watermarks(number)
            if offset > high or (offset and offset < low):
                raise SourceError(
                    f"{self.name}, partition {number}: was read up to offset {offset:,}, and has {low:,} to {high:,}; "
                    "is it another log, or were entries removed before they were read? Name another log with --log"
                )
        self._next = {n: offset or self._watermarks(n)[0] for n, offset in offsets.items()}
        with self._errors():
            self._consumer.assign([self._kafka.TopicPartition(self._topic, n, o) for n, o in self._next.items()])

    def _watermarks(self, number: int) -> tuple[int, int]:
        with self._errors():
            found = self._consumer.get_watermark_offsets(
                self._kafka.TopicPartition(self._topic, number), timeout=TIMEOUT_S
            )
        if found is None:
            raise SourceError(f"{self.name} at {self._brokers}: no answer within {TIMEOUT_S:.0f} s")
        return int(found[0]), int(found[1])

    def read(self, max_entries: int, timeout_s: float) -> list[Entry]:
        with self._errors():
            messages = self._consumer.consume(1, timeout=timeout_s)
            if messages and max_entries > 1:  # waiting for all of them would last until the timeout
                messages += self._consumer.consume(max_entries - 1, timeout=0)
            for message in messages:
                if message.error() is not None:
                    raise self._kafka.KafkaException(message.error())
        found = [self._entry(message) for message in messages]
        for entry in found:
            self._next[entry.partition] = entry.next_offset
        return found

    def _entry(self, message: Any) -> Entry:
        kind, milliseconds = message.timestamp()
        arrived_us = -1 if kind == self._kafka.TIMESTAMP_NOT_AVAILABLE else milliseconds * 1000
        return Entry(message.partition(), message.offset(), message.offset() + 1, message.value() or b"", arrived_us)

    def ends(self) -> dict[int, int]:
        return {number: self._watermarks(number)[1] for number in self.partitions()}

    def num_behind(self, offsets: Mapping[int, int]) -> dict[int, int]:
        marks = {number: self._watermarks(number) for number in offsets}
        return {n: max(marks[n][1] - max(offset, marks[n][0]), 0) for n, offset in offsets.items()}

    def peek(self, partition: int, offset: int) -> Entry | None:
        """Reads it with a client of its own: what this one reads ahead stays."""
        low, high = self._watermarks(partition)
        if max(offset, low) >= high:
            return None
        with self._errors():
            other = self._kafka.Consumer(self._config)
            try:
                other.assign([self._kafka.TopicPartition(self._topic, partition, max(offset, low))])
                messages = other.consume(1, timeout=TIMEOUT_S)
            finally:
                other.close()
        return self._entry(messages[0]) if messages and messages[0].error() is None else None

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        with self._errors():
            chosen = [self._kafka.TopicPartition(self._topic, n, offset) for n, offset in offsets.items() if offset]
            if chosen:
                self._consumer.commit(offsets=chosen, asynchronous=True)

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(error: Exception) -> str:
    first = error.args[0] if error.args else error
    return str(first.str()) if hasattr(first, "str") else str(first)
