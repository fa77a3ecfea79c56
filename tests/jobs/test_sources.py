"""Every kind of log that can be streamed: the contract, and what is its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contracts.source import SourceContract
from tests.jobs.stream_worker import stream
from tests.jobs.test_stream import contents, events_of
from tests.store.servers import Server
from vista.errors import SourceError
from vista.jobs.sources.contract import EventSource, open_source
from vista.jobs.sources.directory import DirectoryLog
from vista.jobs.sources.redis_streams import id_of, offset_of


class TestDirectory(SourceContract):
    @pytest.fixture
    def source(self, tmp_path) -> Iterator[EventSource]:
        self.path = tmp_path
        DirectoryLog(tmp_path, 2)
        with open_source(f"dir:{tmp_path}") as source:
            yield source

    def add(self, partition: int, values: list[bytes]) -> None:
        with (self.path / f"{partition}.jsonl").open("ab") as file:
            file.writelines(value + b"\n" for value in values)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


class TestRedis(SourceContract):
    @pytest.fixture
    def source(self, server) -> Iterator[EventSource]:
        self.client = server.client()
        self.client.flushall()
        with open_source(f"{server.url}?stream=log&partitions=2&group=g") as source:
            yield source
        self.client.close()

    def add(self, partition: int, values: list[bytes]) -> None:
        for value in values:
            self.client.xadd(f"log:{partition}", {"event": value})

    def test_the_group_follows_and_takes_over_what_another_consumer_left_pending(self, source):
        self.add(0, [b"%d" % n for n in range(5)])
        self.client.xgroup_create("log:0", "g", id="0")
        self.client.xreadgroup("g", "crashed", {"log:0": ">"}, count=3)
        source.start({0: 0, 1: 0})
        found = self.read(source, 5)
        assert self.client.xpending("log:0", "g")["consumers"] == [{"name": b"vista", "pending": 3}]
        source.acknowledge({0: found[1].next_offset})
        assert self.client.xpending("log:0", "g")["pending"] == 1
        source.acknowledge({0: found[4].next_offset})
        (group,) = self.client.xinfo_groups("log:0")
        assert (group["pending"], group["last-delivered-id"].decode()) == (0, id_of(found[4].offset))

    def test_another_stream_of_that_name_is_refused(self, source):
        """It would be read in silence from where its ids reach the old ones, perhaps never."""
        self.add(0, [b"%d" % n for n in range(5)])
        source.start({0: 0})
        offset = self.read(source, 5)[-1].next_offset
        self.client.xtrim("log:0", maxlen=0)  # all that was read may go
        source.start({0: offset})
        self.client.delete("log:0")
        self.client.xadd("log:0", {"event": b"0"}, id="5-0")
        with pytest.raises(
            SourceError, match=r"read up to .*, and its newest entry ever was 5-0: it is another stream"
        ):
            source.start({0: offset})
        self.client.delete("log:0")
        with pytest.raises(SourceError, match="newest entry ever was 0-0"):
            source.start({0: offset})


def test_ids_are_offsets_of_the_same_order():
    ids = ["0-1", "1-0", "1700000000000-0", "1700000000000-1048575", "1700000000001-0"]
    assert [id_of(offset_of(text)) for text in ids] == ids
    assert sorted(map(offset_of, ids)) == list(map(offset_of, ids))
    with pytest.raises(SourceError, match="1048576 entries"):
        offset_of("1-1048576")


@pytest.fixture(scope="module")
def kafka_server() -> tuple[str, Any]:
    """The client's mock broker speaks the protocol; it lives as long as the client that made it."""
    kafka = pytest.importorskip("confluent_kafka", reason="needs the extra: pip install 'vista-recsys[kafka]'")
    producer = kafka.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "x", "log_level": 0})
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    return f"{broker.host}:{broker.port}", producer


class TestKafka(SourceContract):
    count = 0

    @pytest.fixture
    def source(self, kafka_server) -> Iterator[EventSource]:
        brokers, self.producer = kafka_server
        TestKafka.count += 1
        self.topic = f"topic{TestKafka.count}"
        self.producer.list_topics(self.topic, timeout=10)  # makes it, with the broker's default of four partitions
        with open_source(f"kafka://{brokers}/{self.topic}?group=g") as source:
            yield source

    def add(self, partition: int, values: list[bytes]) -> None:
        for value in values:
            self.producer.produce(self.topic, value, partition=partition)
        self.producer.flush(10)


def test_a_redis_stream_gives_the_states_a_folder_gives(server, tmp_path):
    client, events = server.client(), events_of(1, 100)
    client.flushall()
    for event in events:
        client.xadd("one", {"event": json.dumps(event)})
    client.close()
    DirectoryLog(tmp_path / "log").append(events)
    for source, name in ((f"{server.url}?stream=one", "a"), (f"dir:{tmp_path / 'log'}", "b")):
        stream(source, f"memory:{tmp_path}{name}", tmp_path / "dead", until_end=True, log="one")
    assert contents(f"memory:{tmp_path}a", ("tokens",)) == contents(f"memory:{tmp_path}b", ("tokens",))


def test_a_store_that_is_away_for_a_while_loses_nothing(tmp_path):
    """Stopped in the middle of a stream and started again: the states are those of a stream that never waited."""
    server, events = Server(tmp_path / "redis"), events_of(2, 300)
    DirectoryLog(tmp_path / "log").append(events)
    source, dead = f"dir:{tmp_path / 'log'}", tmp_path / "dead"

    def interrupt() -> None:
        with server.client() as client:
            while not client.exists("vista:facts"):
                time.sleep(0.01)
        time.sleep(0.3)
        server.kill()
        time.sleep(0.5)
        server.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    metrics = tmp_path / "metrics"
    try:
        stream(source, server.url, dead, until_end=True, max_events=3, metrics_file=metrics)
        thread.join()
        stream(source, f"memory:{tmp_path}", dead, until_end=True)
        assert contents(server.url) == contents(f"memory:{tmp_path}")
        assert "vista_stream_retries_total 0\n" not in metrics.read_text()
    finally:
        thread.join()
        server.kill()
