"""Events of a log, in the states exactly once: killed, delivered again, cut in any way, with bad entries among them."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import time
import urllib.request
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.jobs.stream_worker import start, stream
from tests.updates.test_apply import NUM_ITEMS, RUN, SECOND, START_US, VERSION, R, S
from vista.errors import ConfigError, SourceError, StoreError, VistaWarning
from vista.jobs.parse import NoEvent, event_of
from vista.jobs.pending import Cadence
from vista.jobs.sources.contract import open_source, partition_of
from vista.jobs.sources.directory import DirectoryLog
from vista.jobs.stream import Stream, StreamOptions
from vista.jobs.stream_status import stream_status
from vista.models.batch import flatten
from vista.models.inputs import Events
from vista.store.contract import open_store
from vista.store.record import KINDS, unpack, user_key
from vista.updates.apply import NewEvents, apply_events
from vista.updates.stored import load_states


def events_of(seed: int, size: int, num_users: int = 5, misorder: bool = True, ids: bool = True) -> list[dict]:
    """In order of arrival: late and repeated ones, some without an id."""
    rng = np.random.default_rng(seed)
    times = START_US + np.cumsum(rng.choice([0, 1, 3600], size)) * SECOND
    late = np.where(rng.random(size) < 0.1, rng.integers(0, 40_000, size), 0) * SECOND if misorder else 0
    source = np.arange(size)
    if misorder:
        source = np.where(rng.random(size) < 0.1, np.maximum(source - rng.integers(0, 30, size), 0), source)
    user, item, action = (
        rng.integers(0, num_users, size),
        rng.integers(0, NUM_ITEMS, size),
        rng.choice(["a", "b"], size),
    )
    columns = (user[source], item[source], (times - late)[source], action[source], source)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {"user_id": u, "item_id": i, "timestamp_us": t, "action": a, "event_id": n if ids and n % 3 else None}
        for u, i, t, a, n in rows
    ]


def contents(store: str, kinds: tuple[str, ...] = KINDS[:3]) -> dict:
    with open_store(store, read_only=True) as opened:
        return {(kind, key): blob for kind in kinds for key, blob in opened.scan(kind, VERSION)}


@pytest.fixture
def dead(tmp_path) -> Path:
    return tmp_path / "dead.jsonl"


# -- exactly once


def check_kills(folder: Path, num_kills: int, size: int, seed: int, **options) -> None:
    """Kill the stream while the log grows; in the end the store is, bit by bit, that of one run over the whole log."""
    rng, events = random.Random(seed), events_of(seed, size)
    options |= {"borders": True, "log": "one"}
    end = {"borders": True, "log": "one", "until_end": True}
    log, whole = DirectoryLog(folder / "log", 2), DirectoryLog(folder / "whole", 2)
    whole.append(events)
    part = -(-size // num_kills)
    num_at_work = 0
    for number in range(num_kills):
        log.append(events[number * part : (number + 1) * part])
        worker = start(f"dir:{folder / 'log'}", str(folder / "store"), folder / "dead", **options)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begins\n"
        time.sleep(rng.uniform(0, 0.4))
        worker.kill()
        num_at_work += worker.wait() == -9
        worker.stdout.close()
    assert num_at_work == num_kills
    stream(f"dir:{folder / 'log'}", str(folder / "store"), folder / "dead", **end)
    stream(f"dir:{folder / 'whole'}", f"memory:{folder}", folder / "dead whole", **end)
    assert contents(str(folder / "store")) == contents(f"memory:{folder}")
    assert refused(folder / "dead") == refused(folder / "dead whole")


def refused(path: Path) -> list[tuple]:
    letters = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((letter["partition"], letter["offset"], letter["reason"]) for letter in letters)


def test_killed_twice(tmp_path):
    check_kills(tmp_path, 2, size=600, seed=1, max_events=7, max_ms=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_sixty_times(tmp_path):
    check_kills(tmp_path, 60, size=6000, seed=2, max_events=7, max_ms=5)


@example(seed=6, cuts=[1, 7], ids=False)  # the last of a user's events are turned down: they raise no mark
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3), ids=st.booleans())
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
def test_how_a_log_is_cut_makes_no_difference_to_the_last_bit(tmp_path_factory, seed, cuts, ids):
    folder = tmp_path_factory.mktemp("cut")
    DirectoryLog(folder / "log").append(events_of(seed, 200, num_users=2, ids=ids))
    for number, size in enumerate([1000, *cuts]):
        name = f"memory:{folder}{number}"
        stream(f"dir:{folder / 'log'}", name, folder / f"dead{number}", until_end=True, max_events=size)
        assert contents(name) == contents(f"memory:{folder}0")


def test_what_is_delivered_again_changes_nothing(tmp_path, dead):
    source, store = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}"
    DirectoryLog(tmp_path / "log").append(events_of(3, 150, ids=False, misorder=False))
    stream(source, store, dead, until_end=True)
    before = contents(store)
    with open_store(store) as opened:
        ((key, _),) = opened.scan("position", VERSION)
        opened.delete(key, VERSION)
    assert stream(source, store, dead, until_end=True).counts["delivered before"] == 150
    assert contents(store) == before
    assert stream(source, store, dead, until_end=True, log="another").counts["delivered before"] == 0


def test_states_are_those_of_the_model_alone(tmp_path, dead):
    """Without anything of the stream: each user's events, a segment at a time."""
    source, store, events = (
        f"dir:{tmp_path / 'log'}",
        f"memory:{tmp_path}",
        events_of(4, 300, misorder=False, ids=False),
    )
    DirectoryLog(tmp_path / "log", 3).append(events)
    assert stream(source, store, dead, until_end=True, max_events=11).counts["applied"] == 300
    model = RUN.sequence_model
    with open_store(store) as opened, torch.no_grad():
        for user in range(5):
            own = [event for event in events if event["user_id"] == user]
            state = model.init_state(1)
            for first in range(0, len(own), S):
                part = own[first : first + S]
                item = RUN.catalogue.encode(np.array([e["item_id"] for e in part])).astype(np.int64)
                action = RUN.schema.action_index([e["action"] for e in part])
                times = torch.tensor([e["timestamp_us"] for e in part])
                columns = torch.from_numpy(item), torch.tensor(action), times, torch.tensor([0, len(part)])
                state = model.extend(state, Events.from_log(*columns), alone=True)
            found = load_states(model, opened, [user], VERSION).tracked.state
            pairs = zip(flatten(found.memory), flatten(state.memory), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert torch.equal(found.recent.gap_us, state.recent.gap_us)


def test_events_that_others_post_meanwhile_are_kept(tmp_path, dead):
    """As by a server that takes events of the same users between a stream's reading of a state and its writing."""
    source, store, events = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}", events_of(4, 60, misorder=False, ids=False)
    DirectoryLog(tmp_path / "log").append(events)
    options = StreamOptions(dead, until_end=True, begin=True, quiet=True, max_events=7)
    with open_source(source) as log, open_store(store) as opened:
        made = Stream(RUN, opened, log, options)
        commit, posted = opened.commit, []

        def beaten(writes, version, provided=()):
            users = [key for kind, key, _ in writes if kind == "state"]
            if users and len(posted) % 2 == 0:
                [blob] = opened.get_many("state", users[:1], version)
                at = np.array([START_US if blob is None else unpack(blob).as_of_us])
                opened.commit = commit
                apply_events(RUN, opened, NewEvents([int(users[0].decode().removeprefix("i:"))], [1], at))
                opened.commit = beaten
            posted.extend(users[:1])
            commit(writes, version, provided)

        opened.commit = beaten
        report = made.go()
        opened.commit = commit
        states = load_states(RUN.sequence_model, opened, list(range(5)), VERSION).tracked.state
    assert report.counts["applied"] == 60
    assert len(posted) > 15
    assert int(states.progress.num_events.sum()) == 60 + -(-len(posted) // 2)


# -- what cannot be applied


def test_what_is_no_event_becomes_a_dead_letter_with_the_reason_and_stops_nothing(tmp_path, dead):
    source, store, events = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}", events_of(5, 40, misorder=False)
    DirectoryLog(tmp_path / "log").append(events)
    with (tmp_path / "log" / "0.jsonl").open("ab") as file:
        bad = [b"{", b"[1]", b"\xff\xfe", b"", b'{"user_id": 1}', b'{"user_id": 1, "item_id": 2, "timestamp": "soon"}']
        bad += [b'{"user_id": 1, "item_id": "%s", "timestamp": 1700000000}' % (b"1" * 5_000)]
        bad += [b"x" * 300_000, b'{"user_id": true, "item_id": 2, "timestamp": 1700000000}']
        file.write(b"\n".join([*bad, b'{"user_id": 1, "item_id": 2, "timestamp": 5}', b""]))
    DirectoryLog(tmp_path / "log").append(events_of(6, 3, misorder=False))
    counts = stream(source, store, dead, until_end=True).counts
    assert counts["malformed"] == len(bad)
    assert counts["bad clock"] == 1
    assert sum(counts.values()) == 40 + len(bad) + 1 + 3
    letters = [json.loads(line) for line in dead.read_text().splitlines()]
    reasons = " ".join(letter["reason"] for letter in letters)
    for text in ("not JSON", "not a JSON object", "no item_id", "ISO 8601", "longer than", "bad clock"):
        assert text in reasons
    assert len(letters) == len(bad) + 1


@pytest.mark.parametrize(
    ("text", "time_us"),
    [("1700000000", 1_700_000_000_000_000), ("1700000000123", 1_700_000_000_123_000),
     ("1700000000.5", 1_700_000_000_500_000),
     ('"2023-11-14T22:13:20Z"', 1_700_000_000_000_000), ('"2023-11-14T22:13:20.000001"', 1_700_000_000_000_001)],
)  # fmt: skip
def test_times_are_understood(text, time_us):
    assert event_of(b'{"user_id": "x", "item_id": 2, "timestamp": %s}' % text.encode())[2] == time_us


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_make_the_parser_fail(value):
    with suppress(NoEvent):
        event_of(value)


def test_a_damaged_state_stops_its_user_alone(tmp_path, dead):
    source, store = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}"
    log = DirectoryLog(tmp_path / "log")
    log.append(events_of(7, 60, misorder=False))
    stream(source, store, dead, until_end=True)
    with open_store(store) as opened:
        opened.commit([("state", user_key(1), b"damaged")], VERSION)
    more = events_of(8, 60, misorder=False)
    log.append([event | {"event_id": None, "timestamp_us": event["timestamp_us"] + 10**12} for event in more])
    counts = stream(source, store, dead, until_end=True).counts
    assert counts["damaged state"] == sum(event["user_id"] == 1 for event in more)
    assert counts["applied"] == 120 - counts["damaged state"]


# -- tokens on a cadence, offsets, stopping


def test_tokens_wait_for_their_cadence_and_are_whole_in_the_end(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(9, 200, misorder=False))
    source = f"dir:{tmp_path / 'log'}"
    often = stream(source, f"memory:{tmp_path}1", dead, until_end=True, max_events=10)
    with pytest.warns(VistaWarning, match="rankings know nothing of up to 9 of the newest events"):
        seldom = stream(source, f"memory:{tmp_path}2", dead, until_end=True, max_events=10, cadence=Cadence(events=10))
    assert 5 <= seldom.num_refreshes < often.num_refreshes / 3
    assert contents(f"memory:{tmp_path}1") == contents(f"memory:{tmp_path}2")


@given(every=st.integers(1, R - S + 2), max_events=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_event_is_in_neither_tokens_nor_the_newest_events(tmp_path_factory, every, max_events, seed):
    """After every commit: R events reach back to what the tokens have, and a record lacks what was said at most."""
    folder = tmp_path_factory.mktemp("gap")
    DirectoryLog(folder / "log").append(events_of(seed, 120, num_users=2))
    options = StreamOptions(
        folder / "dead", until_end=True, begin=True, quiet=True, max_events=max_events, cadence=Cadence(every)
    )
    unread = [0]
    with open_source(f"dir:{folder / 'log'}") as log, open_store(f"memory:{folder}") as store:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VistaWarning)
            made = Stream(RUN, store, log, options)
        commit = store.commit

        def watched(writes, version, provided=()):
            commit(writes, version, provided)
            for key in (user_key(0), user_key(1)):
                blobs = [store.get_many(kind, [key], version)[0] for kind in ("state", "tokens")]
                known, in_record = (0 if blob is None else unpack(blob).num_events for blob in blobs)
                assert known - in_record // S * S <= R
                unread.append(known - in_record)

        store.commit = watched
        made.go()
    assert max(unread) <= options.cadence.most_unread
    assert max_events >= every or max(unread) > 0, "the cadence makes readers wait, or the test would show nothing"


@pytest.mark.parametrize(
    ("cadence", "most"),
    [(Cadence(), 0), (Cadence(7), 6), (Cadence(7, 30), 6), (Cadence(None, 30), np.inf), (Cadence(None, 0), 0)],
)
def test_what_a_cadence_leaves_unread(cadence, most):
    assert cadence.most_unread == most


def test_a_cadence_that_recent_events_cannot_bridge_is_refused(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(1, 5))
    with pytest.raises(
        ConfigError, match=r"up to 17 events old, more than the 16 recent events.*give events=10 at most"
    ):
        stream(f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}", dead, cadence=Cadence(events=11))


def test_a_stop_finishes_what_was_begun_and_the_next_one_goes_on(tmp_path, dead):
    log, source, store = DirectoryLog(tmp_path / "log"), f"dir:{tmp_path / 'log'}", str(tmp_path / "store")
    log.append(events_of(10, 50, misorder=False))
    worker = start(source, store, dead)
    assert worker.stdout is not None
    worker.stdout.readline()
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and sum(row.offset for row in _status(source, store)) == 0:
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert "'applied': 50" in worker.stdout.read()
    worker.stdout.close()
    log.append(events_of(10, 60, misorder=False)[50:])
    assert stream(source, store, dead, until_end=True).counts["applied"] == 60
    (row,) = _status(source, store)
    assert (row.offset, row.start_offset, row.num_behind, row.behind_s) == (row.end, row.end, 0, 0.0)


def _status(source: str, store: str):
    try:
        with open_source(source) as log, open_store(store, read_only=True) as opened:
            return stream_status(opened, log)
    except StoreError:  # not there yet
        return []


def test_a_partition_taken_over_is_given_up(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(11, 30))
    with open_source(f"dir:{tmp_path / 'log'}") as log, open_store(f"memory:{tmp_path}") as store:
        options = StreamOptions(dead_letters=dead, begin=True, until_end=True, quiet=True)
        first = Stream(RUN, store, log, options)
        Stream(RUN, store, log, options)
        with pytest.raises(ConfigError, match="another process streams it since"):
            first.go()


def test_who_was_taken_over_in_the_midst_of_a_micro_batch_writes_nothing(tmp_path, dead):
    """The other one has streamed the whole log between this one's reading and its writing: nothing of it is lost."""
    DirectoryLog(tmp_path / "log").append(events_of(11, 60, misorder=False))
    source, wanted = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path} alone"
    stream(source, wanted, dead, until_end=True)
    with open_source(source) as log, open_store(f"memory:{tmp_path}") as store:
        first = Stream(RUN, store, log, StreamOptions(dead, begin=True, until_end=True, max_events=10, quiet=True))
        commit = store.commit

        def late(*arguments):
            store.commit = commit
            stream(source, f"memory:{tmp_path}", dead, until_end=True)
            return commit(*arguments)

        store.commit = late
        with pytest.raises(ConfigError, match="another process streams it since"):
            first.go()
    assert contents(f"memory:{tmp_path}") == contents(wanted)


def test_processes_share_a_log_by_partitions_into_one_store(tmp_path, dead):
    """Two at once; a third one that wants a partition of theirs takes it over, and theirs ends with an error."""
    log, source, store = DirectoryLog(tmp_path / "log", 4), f"dir:{tmp_path / 'log'}", str(tmp_path / "store")
    events = events_of(14, 300, num_users=20)
    log.append(events[:150])
    workers = [start(source, store, tmp_path / f"dead{n}", partitions=n) for n in ([0, 1], [2, 3])]
    try:
        for worker in workers:
            worker.stdout.readline()
        log.append(events[150:])
        end_s = time.monotonic() + 120
        while time.monotonic() < end_s and (
            len(rows := _status(source, store)) < 4 or sum(row.num_behind for row in rows)
        ):
            time.sleep(0.1)
        stream(source, store, dead, until_end=True, partitions=(1,))
        log.append([{"user_id": n, "item_id": 1, "timestamp_us": START_US + 10**12} for n in range(20)])
        assert workers[0].wait(60) == 1, "its partition 1 was taken over"
        workers[1].send_signal(signal.SIGTERM)
        assert workers[1].wait(60) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()
    stream(source, store, dead, until_end=True)
    stream(source, f"memory:{tmp_path}", dead, until_end=True)
    assert contents(store) == contents(f"memory:{tmp_path}")


def test_metrics_say_what_was_done(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(12, 30, misorder=False))
    file = tmp_path / "metrics.prom"
    stream(f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}", dead, until_end=True, metrics_file=file)
    text = file.read_text()
    assert 'vista_stream_entries_total{outcome="applied"} 30\n' in text
    assert 'vista_stream_lag_events{partition="0"} 0\n' in text
    assert "vista_stream_freshness_seconds_count 5\n" in text


def test_a_scrape_of_a_running_stream_shows_lag_and_freshness(tmp_path, dead):
    """At work: with entries behind it before its first micro-batch, none after it. Then the port is free again."""
    log = DirectoryLog(tmp_path / "log")
    log.append(events_of(12, 30, misorder=False))
    with open_source(f"dir:{tmp_path / 'log'}") as source, open_store(f"memory:{tmp_path}") as store:
        made = Stream(RUN, store, source, StreamOptions(dead, begin=True, metrics_port=0, quiet=True))
        scrapes: list[str] = []
        made._gather = lambda gather=made._gather: (scrapes.append(scrape(made.metrics.port)), gather())[1]
        looked = made._report
        made._report = lambda is_last=False: (looked(True), len(scrapes) > 1 and made.stop.set())[0]
        made.go()
    before, after = scrapes
    assert 'vista_stream_lag_events{partition="0"} 30\n' in before
    assert float(re.search(r'lag_seconds\{partition="0"\} (\S+)', before)[1]) > 0
    assert "vista_stream_arrival_freshness_seconds_count 0\n" in before
    assert 'vista_stream_lag_events{partition="0"} 0\n' in after
    assert 'vista_stream_lag_seconds{partition="0"} 0\n' in after
    assert "vista_stream_arrival_freshness_seconds_count 5\n" in after  # of five users
    assert float(re.search(r"arrival_freshness_seconds_sum (\S+)", after)[1]) > 0
    with pytest.raises(OSError, match="refused"):
        scrape(made.metrics.port)


def scrape(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def test_a_port_in_use_is_an_error_that_names_it(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(12, 3))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port}: cannot be listened to"):
            stream(f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}", dead, until_end=True, metrics_port=port)


# -- bad input


def test_bad_input_is_an_error_that_says_what_to_do(tmp_path, dead):
    DirectoryLog(tmp_path / "log").append(events_of(13, 3))
    source, store = f"dir:{tmp_path / 'log'}", f"memory:{tmp_path}"
    for url, text in (("dir:/no/where", "there is no folder"), ("file:x", "not the URL of an event log"),
                      ("redis://h/0", "stream=NAME"), ("kafka://h", "kafka://BROKER")):  # fmt: skip
        with pytest.raises(SourceError, match=text):
            stream(url, store, dead)
    with pytest.raises(SourceError, match="there is no partition 7"):
        stream(source, store, dead, partitions=(7,))
    with pytest.raises(SourceError, match="dead letters cannot be kept there"):
        stream(source, store, tmp_path, until_end=True)
    with pytest.raises(ConfigError, match="--metrics-file"):
        stream(source, store, dead, metrics_file=tmp_path / "no" / "where")
    with pytest.raises(ConfigError, match="refresh-after"):
        Cadence.parse(["often"])
    stream(source, store, dead, until_end=True)
    (tmp_path / "log" / "0.jsonl").write_text("")
    with pytest.raises(SourceError, match="is it another log"):
        stream(source, store, dead, until_end=True)


# -- the log in a folder


def test_a_torn_line_is_waited_for_and_ended_by_the_next_writer(tmp_path):
    log, file = DirectoryLog(tmp_path), tmp_path / "0.jsonl"
    log.append([{"user_id": 1}])
    with open_source(f"dir:{tmp_path}") as source:
        source.start({0: 0})
        (first,) = source.read(10, 0)
        with file.open("ab") as torn:
            torn.write(b'{"user_id": ')
        assert source.read(10, 0) == []
        assert source.ends() == {0: first.next_offset}
        with file.open("ab") as torn:
            torn.write(b"2}\n{")
        assert [entry.value for entry in source.read(10, 0)] == [b'{"user_id": 2}']
        log.append([{"user_id": 3}])
        values = [entry.value for entry in source.read(10, 0)]
        assert values[0] == b"{"
        assert json.loads(values[1])["user_id"] == 3
        source.start({0: first.next_offset})  # the same again, from any offset
        assert [entry.value for entry in source.read(10, 0)][1:] == values
        assert source.num_behind({0: first.next_offset}) == {0: 3}


def test_users_keep_to_their_partition(tmp_path):
    assert partition_of("7", 5) == partition_of(7, 5)
    assert len({partition_of(user, 5) for user in range(100)}) == 5
