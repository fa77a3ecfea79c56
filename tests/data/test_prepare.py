"""`vista prepare` from tables to prepared data: what comes out, for every kind of table and every rule."""

from __future__ import annotations

import inspect
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.data.small_logs import (
    SECOND_US,
    START_S,
    histories_of,
    prepared,
    requests_of,
    small_log,
    write,
)
from vista.catalogue import UNKNOWN_ROWS
from vista.cli.main import app
from vista.cli.prepare import prepare as command
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare, summary_lines, verify
from vista.errors import DataError, StaleOutput
from vista.schema import NUM_CONTEXT_BUCKETS, Manifest


def plain_histories(events: pl.DataFrame) -> dict[Any, list[tuple[Any, Any, int]]]:
    """What ``histories_of`` should be where no rule leaves anything out, times in seconds."""
    histories: dict[Any, list[tuple[Any, Any, int]]] = {}
    for row in events.sort("user_id", "timestamp", maintain_order=True).iter_rows(named=True):
        event = (row["item_id"], row.get("action"), row["timestamp"] * SECOND_US)
        histories.setdefault(row["user_id"], []).append(event)
    return histories


def vista_prepare(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    result = CliRunner().invoke(app, ["prepare", *args])
    return result.exit_code, result.stdout, result.stderr


# --- where the events come from --------------------------------------------------------------------------------------


def one_parquet(events: pl.DataFrame, folder: Path) -> str:
    return write(events, folder / "log.parquet")


def one_csv(events: pl.DataFrame, folder: Path) -> str:
    return write(events, folder / "log.csv")


def one_gzipped_csv(events: pl.DataFrame, folder: Path) -> str:
    events.write_csv(folder / "log.csv.gz", compression="gzip")
    return str(folder / "log.csv.gz")


def one_tsv(events: pl.DataFrame, folder: Path) -> str:
    events.write_csv(folder / "log.tsv", separator="\t")
    return str(folder / "log.tsv")


def a_folder(events: pl.DataFrame, folder: Path) -> str:
    """Days in folders of their own, of both kinds, beside files that are no tables."""
    write(events[:50], folder / "log" / "day=1" / "part.parquet")
    write(events[50:90], folder / "log" / "day=2" / "part.csv")
    write(events[90:], folder / "log" / "day=3" / "part.pq.parquet")
    (folder / "log" / "_SUCCESS").touch()
    (folder / "log" / ".part.parquet.crc").write_text("not a table")
    return str(folder / "log")


def a_glob(events: pl.DataFrame, folder: Path) -> str:
    write(events[:70], folder / "log-1.parquet")
    write(events[70:], folder / "log-2.parquet")
    write(events, folder / "other.parquet")
    return str(folder / "log-*.parquet")


@pytest.mark.parametrize("form", [one_parquet, one_csv, one_gzipped_csv, one_tsv, a_folder, a_glob])
def test_every_form_of_a_log_gives_the_same_data(form: Callable[[pl.DataFrame, Path], str], tmp_path: Path) -> None:
    events = small_log()
    prepare(PrepareOptions(form(events, tmp_path), keep_duplicates=True), tmp_path / "out")
    assert histories_of(PreparedData.open(tmp_path / "out")) == plain_histories(events)


def test_names_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    events = write(small_log(), tmp_path / "log [1].parquet")
    prepare(PrepareOptions(events), tmp_path / "out [1]")
    assert PreparedData.open(tmp_path / "out [1]").histories.num_events == 160


def test_columns_of_other_names(tmp_path: Path) -> None:
    events = small_log()
    names = {"user_id": "member", "item_id": "song", "timestamp": "at", "action": "kind"}
    data = prepared(
        tmp_path, events.rename(names).select(pl.lit(1).alias("noise"), *reversed(names.values())),
        user_column="member", item_column="song", timestamp_column="at", action_column="kind", keep_duplicates=True,
    )  # fmt: skip
    assert histories_of(data) == plain_histories(events)


def test_a_log_without_actions(tmp_path: Path) -> None:
    events = small_log().drop("action")
    data = prepared(tmp_path, events, keep_duplicates=True)
    assert data.manifest.actions == ()
    assert not data.histories.action.any()
    assert histories_of(data) == plain_histories(events)


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.UInt8, pl.Int32, pl.UInt64])
def test_ids_of_any_type(dtype: Any, tmp_path: Path) -> None:
    columns = ["user_id", "item_id"]
    text = small_log().with_columns(pl.col(columns).cast(pl.String))
    events = text.with_columns(pl.col(columns).cast(dtype))
    wanted = plain_histories(text if dtype in (pl.String, pl.Categorical) else small_log())
    assert histories_of(prepared(tmp_path, events, keep_duplicates=True)) == wanted


def test_ids_that_are_text_in_one_file_are_text_in_all(tmp_path: Path) -> None:
    """Also where a CSV file's first 10,000 rows look like numbers."""
    lines = [f"{i % 50},{i % 90},{START_S + i}\n" for i in range(10_050)]
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n" + "".join(lines) + f"bob,x7,{START_S}\n")
    write(small_log().drop("action"), tmp_path / "b.parquet")
    prepare(PrepareOptions(str(tmp_path / "*.*")), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    assert {"bob", "1", "49"} <= set(data.user_ids)
    assert histories_of(data)["bob"] == [("x7", None, START_S * SECOND_US)]


def test_ids_are_as_the_log_writes_them(tmp_path: Path) -> None:
    """007 is another user than 7, in every table, and whoever asks for 00012 finds it; a plain integer stays one."""
    rows = [(f"{i % 4:03}", f"{i % 9:05}", START_S + i) for i in range(60)] + [("7", "12", START_S + 60)] * 3
    rows += [("007", "00012", START_S + 61 + i) for i in range(30)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": ["00012", "12", "00001"], "kind": ["a", "b", "c"]})
    shown = pl.DataFrame({"user_id": ["007", "7"] * 20, "item_id": ["12", "00012"] * 20,
                          "timestamp": [START_S + 70 + i for i in range(40)], "click": [0, 1] * 20})  # fmt: skip
    paths = {"events": events, "items": items, "impressions": shown}
    options = {name: write(frame, tmp_path / f"{name}.csv") for name, frame in paths.items()}
    prepare(PrepareOptions(**options), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    assert {"007", "7", "000"} <= set(data.user_ids)
    assert {item for item, *_ in histories_of(data)["007"]} == {"00012"}
    assert (data.catalogue.encode(["00012", "12", "00001"]) >= data.catalogue.first_item).all()
    train = data.impressions("train")
    pairs = zip(data.user_ids[train.user].tolist(), data.catalogue.decode(train.item[train.offsets[:-1]]), strict=True)
    assert set(pairs) == {("007", "12"), ("7", "00012")}
    plain = write(small_log(), tmp_path / "plain.csv")
    prepare(PrepareOptions(plain), tmp_path / "plain")
    assert PreparedData.open(tmp_path / "plain").user_ids.dtype.kind == "i"


def test_every_default_of_the_command_is_that_of_the_call() -> None:
    """So that what Python, the benchmark and the command line prepare is the same."""
    options = {field.name: field.default for field in fields(PrepareOptions)}
    names = {"task": "tasks", "item_feature": "item_features"}
    compared = 0
    for name, parameter in inspect.signature(command).parameters.items():
        default = options.get(names.get(name, name), MISSING)
        if parameter.default is not inspect.Parameter.empty and default is not MISSING:
            assert (parameter.default or None) == (default or None), name
            compared += 1
    assert compared >= 25


# --- times -----------------------------------------------------------------------------------------------------------


def in_datetimes(seconds: pl.Expr) -> pl.Expr:
    return pl.from_epoch(seconds, "s")


TIMES = {
    "s": (lambda t: t, "epoch numbers in s"),
    "s as float": (lambda t: t.cast(pl.Float64) + 0.25, "epoch numbers in s"),
    "s as text": (lambda t: t.cast(pl.String), "epoch numbers in s"),
    "ms": (lambda t: t * 1000 + 250, "epoch numbers in ms"),
    "us": (lambda t: t * 1_000_000 + 250_000, "epoch numbers in us"),
    "ns": (lambda t: t * 1_000_000_000 + 250_000_999, "epoch numbers in ns"),
    "datetime in ms": (lambda t: in_datetimes(t).cast(pl.Datetime("ms")), "dates"),
    "datetime in ns": (lambda t: in_datetimes(t).cast(pl.Datetime("ns")), "dates"),
    "datetime with zone": (
        lambda t: in_datetimes(t).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        "dates",
    ),
    "text without zone": (lambda t: in_datetimes(t).dt.strftime("%Y-%m-%d %H:%M:%S"), "dates"),
    "text with zone": (
        lambda t: in_datetimes(t + 7200).dt.strftime("%Y-%m-%dT%H:%M:%S+02:00"),
        "dates",
    ),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_times_of_any_kind(name: str, suffix: str, tmp_path: Path) -> None:
    convert, statement = TIMES[name]
    events = small_log()
    converted = events.with_columns(convert(pl.col("timestamp")).alias("timestamp"))
    manifest = prepare(PrepareOptions(write(converted, tmp_path / f"log{suffix}")), tmp_path / "out")
    assert manifest.options["timestamps"].startswith(statement)
    quarter = 250_000 if name in ("s as float", "ms", "us", "ns") else 0
    wanted = np.sort(events["timestamp"].to_numpy()) * SECOND_US + quarter
    assert sorted(PreparedData.open(tmp_path / "out").histories.timestamp_us.tolist()) == wanted.tolist()


def test_days_are_times(tmp_path: Path) -> None:
    events = small_log(seconds=86_400 * 300)
    data = prepared(tmp_path, events.with_columns(pl.from_epoch("timestamp", "s").cast(pl.Date)))
    assert (data.histories.timestamp_us % (86_400 * SECOND_US) == 0).all()
    day = datetime.fromtimestamp(events["timestamp"].min(), UTC).replace(hour=0, minute=0, second=0)  # type: ignore[arg-type]
    assert data.manifest.statistics["first_timestamp_us"] == int(day.timestamp()) * SECOND_US


def test_the_unit_that_is_given_holds(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log(), time_unit="ms", earliest="1970-01-01")
    assert data.manifest.statistics["first_timestamp_us"] == small_log()["timestamp"].min() * 1000  # type: ignore[operator]
    assert "--time-unit" in data.manifest.options["timestamps"]


# --- the result against a definition ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    user: int
    item: int
    time: int
    action: str | None
    burst: str | None
    event_id: int | None


@dataclass(frozen=True)
class Rules:
    """Of one run; the columns are used where the flags say so."""

    has_burst: bool = False
    has_event_id: bool = False
    keep_duplicates: bool = False
    max_burst: int | None = None
    min_user_events: int = 1
    max_history: int = 1000

    def options(self) -> dict[str, Any]:
        return {
            "burst_column": "burst" if self.has_burst else None,
            "event_id_column": "event_id" if self.has_event_id else None,
            "keep_duplicates": self.keep_duplicates,
            "max_burst": self.max_burst,
            "min_user_events": self.min_user_events,
            "max_history": self.max_history,
        }


@dataclass
class Expected:
    """What the rules say, by plain loops. bursts: per user, (place of first event, events) of those that are whole."""

    histories: dict[int, list[Event]]
    bursts: dict[int, list[tuple[int, list[Event]]]]
    left_out: Counter[str]


def expected(log: list[Event], rules: Rules) -> Expected:
    histories, bursts_of, left_out = {}, {}, Counter[str]()
    for user in sorted({event.user for event in log}):
        events = sorted((event for event in log if event.user == user), key=lambda event: event.time)
        if not rules.keep_duplicates:
            kept = without_duplicates(events, rules)
            left_out["duplicates"] += len(events) - len(kept)
            events = kept
        bursts = cut_in_bursts(events, rules)
        if rules.max_burst is not None:
            left_out["burst_events"] += sum(len(burst) for burst in bursts if len(burst) > rules.max_burst)
            bursts = [burst for burst in bursts if len(burst) <= rules.max_burst]
        events = [event for burst in bursts for event in burst]
        if 0 < len(events) < rules.min_user_events:
            left_out["short_user_events"] += len(events)
            continue
        cut = max(len(events) - rules.max_history, 0)
        left_out["events_cut"] += cut
        starts = np.cumsum([0, *map(len, bursts)])
        if events:
            histories[user] = events[cut:]
            bursts_of[user] = [(int(s) - cut, b) for s, b in zip(starts, bursts, strict=False) if s >= cut]
    return Expected(histories, bursts_of, left_out)


def without_duplicates(events: list[Event], rules: Rules) -> list[Event]:
    seen, kept = set(), []
    for event in events:
        key = event.event_id if rules.has_event_id else (event.item, event.time, event.action)
        if key is None or key not in seen:
            kept.append(event)
        seen.add(key)
    return kept


def cut_in_bursts(events: list[Event], rules: Rules) -> list[list[Event]]:
    bursts: list[list[Event]] = []
    for event in events:
        before = bursts[-1][-1] if bursts else None
        if rules.has_burst:
            belongs = before is not None and event.burst is not None and event.burst == before.burst
        else:
            belongs = before is not None and event.time == before.time
        if belongs:
            bursts[-1].append(event)
        else:
            bursts.append([event])
    return bursts


def check_histories(data: PreparedData, wanted: Expected) -> None:
    assert histories_of(data) == {
        user: [(event.item, event.action, (START_S + event.time) * SECOND_US) for event in events]
        for user, events in wanted.histories.items()
    }
    have = data.manifest.statistics
    assert have["num_events"] == sum(map(len, wanted.histories.values()))
    assert have["num_duplicates_dropped"] == wanted.left_out["duplicates"]
    assert have["num_burst_events_dropped"] == wanted.left_out["burst_events"]
    assert have["num_short_user_events_dropped"] == wanted.left_out["short_user_events"]
    assert have["num_events_cut"] == wanted.left_out["events_cut"]


@dataclass(frozen=True)
class Possible:
    """A request there may be, and how many earlier events there are to draw its negatives from, and may be drawn."""

    key: tuple[int, int, int, int]  # user, time, events known, positive
    num_earlier: int
    num_allowed: int


def possible_requests(wanted: Expected) -> list[Possible]:
    everything = [event for events in wanted.histories.values() for event in events]
    possible = []
    for user, bursts in wanted.bursts.items():
        for _, burst in bursts:
            time, positive = burst[0].time, burst[0].item
            earlier = [event.item for event in everything if event.time < time]
            if positive in earlier:
                num_known = sum(event.time < time for event in wanted.histories[user])
                allowed = sum(item not in {event.item for event in burst} for item in earlier)
                possible.append(Possible((user, time, num_known, positive), len(earlier), allowed))
    return possible


def check_requests(data: PreparedData | None, wanted: Expected) -> None:
    """Each request is possible; one is missing only where almost nothing could be drawn for it."""
    made = [] if data is None else requests_of(data)
    missing = Counter(p.key for p in possible_requests(wanted))
    for r in made:
        missing[r.user, r.time_us // SECOND_US - START_S, r.num_known, r.positive] -= 1
    assert all(count >= 0 for count in missing.values())
    unlucky = {p.key for p in possible_requests(wanted) if p.num_allowed < 0.3 * p.num_earlier}
    assert {key for key, count in missing.items() if count} <= unlucky
    if data is not None:
        assert data.manifest.statistics["without_negative"] == missing.total()


EVENTS = st.lists(
    st.builds(
        Event,
        user=st.integers(1, 4),
        item=st.integers(1, 7),
        time=st.integers(0, 25),
        action=st.sampled_from(["view", "buy", None]),
        burst=st.sampled_from(["a", "b", None]),
        event_id=st.one_of(st.none(), st.integers(0, 40)),
    ),
    min_size=1,
    max_size=60,
)
RULES = st.builds(
    Rules,
    has_burst=st.booleans(),
    has_event_id=st.booleans(),
    keep_duplicates=st.booleans(),
    max_burst=st.sampled_from([None, None, 1, 3]),
    min_user_events=st.sampled_from([1, 1, 3]),
    max_history=st.sampled_from([1000, 1000, 5]),
)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(log=EVENTS, rules=RULES, per_partition=st.sampled_from([1, 7, 1000]))
def test_the_result_is_that_of_plain_loops(log: list[Event], rules: Rules, per_partition: int) -> None:
    wanted = expected(log, rules)
    rows = [{**vars(event), "timestamp": START_S + event.time} for event in log]
    frame = pl.DataFrame(rows, schema_overrides={"action": pl.String, "burst": pl.String, "event_id": pl.Int64})
    frame = frame.rename({"user": "user_id", "item": "item_id"})
    with TemporaryDirectory() as folder:
        try:
            data = prepared(
                Path(folder), frame, validation_fraction=0.0, test_fraction=0.0, events_per_partition=per_partition,
                **rules.options(),
            )  # fmt: skip
        except DataError:
            check_requests(None, wanted)
        else:
            check_histories(data, wanted)
            check_requests(data, wanted)


# --- rules, one by one -----------------------------------------------------------------------------------------------


def test_partitions_change_nothing(tmp_path: Path) -> None:
    events, items = small_log(events=600), items_table()
    whole = prepared(tmp_path, events, items=items, max_history=50, min_user_events=3)
    parts = prepared(tmp_path, events, items=items, max_history=50, min_user_events=3, events_per_partition=1)
    assert whole.manifest.checksums == parts.manifest.checksums
    for name in whole.manifest.checksums:
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()
    assert whole.manifest.statistics == parts.manifest.statistics


def test_equal_times_keep_the_order_of_the_log(tmp_path: Path) -> None:
    """Over many files, and where partitions are small."""
    random = np.random.default_rng(1)
    times = START_S + random.integers(0, 3, 20_000)
    log = pl.DataFrame({"user_id": random.integers(0, 3, 20_000), "item_id": np.arange(20_000), "timestamp": times})
    met_again = pl.DataFrame({"user_id": [0], "item_id": [0], "timestamp": [START_S + 9]})  # makes a request
    log = pl.concat([log, met_again])
    for number, first in enumerate(range(0, len(log), 4000)):
        write(log[first : first + 4000], tmp_path / "log" / f"{number}.parquet")
    for events_per_partition in (10, 10**6):
        out = tmp_path / f"{events_per_partition}"
        prepare(PrepareOptions(str(tmp_path / "log"), events_per_partition=events_per_partition), out)
        assert histories_of(PreparedData.open(out)) == plain_histories(log)


def test_a_long_history_keeps_its_newest_events(tmp_path: Path) -> None:
    events = small_log(events=500).with_columns(timestamp=pl.int_range(500) + START_S)
    data = prepared(tmp_path, events, max_history=50)
    everything = plain_histories(events)
    assert histories_of(data) == {user: history[-50:] for user, history in everything.items()}
    cut = {user: len(history) - 50 for user, history in everything.items() if len(history) > 50}
    assert data.manifest.statistics["num_events_cut"] == sum(cut.values()) > 0
    assert data.manifest.statistics["num_users_cut"] == len(cut)
    said = f"left out: {sum(cut.values()):,} oldest events of {len(cut)} histories above 50"
    assert said in summary_lines(data.manifest)


def test_short_users_are_left_out_and_their_items_with_them(tmp_path: Path) -> None:
    short = pl.DataFrame(
        {"user_id": [77, 77], "item_id": [5, 5], "timestamp": [START_S, START_S + 1], "action": "view"}
    )
    data = prepared(tmp_path, pl.concat([small_log(), short]), min_user_events=3)
    assert 77 not in data.user_ids
    assert data.manifest.statistics["num_short_users_dropped"] == 1
    assert data.manifest.statistics["num_short_user_events_dropped"] == 2
    index = data.catalogue.encode([5])
    unknown = data.catalogue.unknown_index(np.array([5]))
    assert data.catalogue.embedding_row[index] == data.catalogue.embedding_row[unknown]  # known by name alone


def test_a_large_burst_is_left_out_whole(tmp_path: Path) -> None:
    bulk = small_log(events=20).with_columns(
        user_id=pl.lit(1, pl.Int64), item_id=pl.int_range(100, 120), timestamp=pl.lit(START_S + 1000, pl.Int64)
    )
    data = prepared(tmp_path, pl.concat([small_log(), bulk]), max_burst=10)
    assert data.manifest.statistics["num_burst_events_dropped"] == 20
    assert data.manifest.statistics["last_timestamp_us"] < (START_S + 1000) * SECOND_US


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    log = small_log().unique(maintain_order=True)
    twice = pl.concat([log, log[:30], log[:5]])
    data = prepared(tmp_path, twice)
    assert data.manifest.statistics["num_duplicates_dropped"] == 35
    assert histories_of(data) == plain_histories(log)
    kept = prepared(tmp_path, twice, keep_duplicates=True)
    assert histories_of(kept) == plain_histories(twice)


# --- items -----------------------------------------------------------------------------------------------------------


def items_table() -> pl.DataFrame:
    """20 items of `small_log` and 5 more; every fifth lacks everything."""
    number = np.arange(25)
    rows = pl.DataFrame({"item_id": number + 100, "genre": [f"g{i % 4}" for i in number], "year": 1990 + number % 3})
    rows = rows.with_columns(
        price=pl.Series(number * 0.5), vector=pl.Series([[float(i), -1.0] for i in number]),
        name=pl.Series([f"name {i}" for i in number]), added=pl.Series([datetime(2020, 1, 1, tzinfo=UTC)] * 25),
    )  # fmt: skip
    missing = pl.col("item_id") % 5 == 4
    return rows.with_columns(
        pl.when(~missing).then(pl.col(name)).alias(name) for name in rows.columns if name != "item_id"
    )


def test_items_table(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log(), items=items_table())
    catalogue = data.catalogue
    assert catalogue.feature_names == ("genre", "year", "name")
    assert set(catalogue.vectors) == {"price", "vector"}
    assert "added" in data.manifest.options["ignored_item_columns"]
    assert catalogue.num_items == 25
    for row in items_table().iter_rows(named=True):
        (index,) = catalogue.encode([row["item_id"]])
        for name, code in zip(catalogue.feature_names, catalogue.features[index], strict=True):
            values = (None, *catalogue.feature_values[catalogue.feature_names.index(name)])
            assert values[code] == row[name]
        assert catalogue.vectors["price"][index] == [row["price"] or 0]
        assert catalogue.vectors["vector"][index].tolist() == (row["vector"] or [0, 0])
    shared = slice(0, catalogue.first_item)
    assert not catalogue.features[shared].any()
    assert not catalogue.vectors["vector"][shared].any()


def test_a_column_of_identifiers_is_no_feature_unless_named(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": np.arange(300), "code": np.arange(300) + 7})
    data = prepared(tmp_path, small_log(), items=items)
    assert data.catalogue.feature_names == ()
    assert "identifier" in data.manifest.options["ignored_item_columns"]["code"]
    named = prepared(tmp_path, small_log(), items=items, item_features=("code",))
    assert named.catalogue.feature_names == ("code",)


def test_the_catalogue_is_ordered_by_frequency_in_training(tmp_path: Path) -> None:
    events = small_log(events=300)
    border = START_S + 200
    data = prepared(tmp_path, events, keep_duplicates=True, validation_from=str(border))
    before = events.filter(pl.col("timestamp") < border)["item_id"].to_list()
    counts = Counter(before)
    known = sorted(counts, key=lambda item: (-counts[item], item))
    later = sorted(set(events["item_id"].to_list()) - set(known))
    assert data.catalogue.ids.tolist() == [*known, *later]
    first = data.catalogue.first_item
    rows = data.catalogue.embedding_row
    assert rows[first : first + len(known)].tolist() == list(range(1 + UNKNOWN_ROWS, 1 + UNKNOWN_ROWS + len(known)))
    assert set(rows[1:first].tolist()) == set(range(1, 1 + UNKNOWN_ROWS))  # many buckets share few rows


def test_an_item_first_met_after_training_shares_an_unknown_row(tmp_path: Path) -> None:
    events = small_log()
    new = pl.DataFrame({"user_id": [1, 2], "item_id": [50, 50], "timestamp": [START_S + 900, START_S + 901],
                        "action": "view"})  # fmt: skip
    data = prepared(tmp_path, pl.concat([events, new]), validation_from=str(START_S + 300), unknown_buckets=8)
    (index,) = data.catalogue.encode([50])
    assert index >= data.catalogue.first_item  # an item of its own ...
    assert data.catalogue.embedding_row[index] == data.catalogue.unknown_index(np.array([50]))[0]  # ... not learnt
    assert 1 <= data.catalogue.embedding_row[index] <= 8


# --- impressions -----------------------------------------------------------------------------------------------------


def impressions_table(seed: int = 5, rows: int = 120, seconds: int = 400) -> pl.DataFrame:
    """Shown items: two tasks, context of every kind, best scores, and columns that nobody asked for."""
    random = np.random.default_rng(seed)
    rank = random.normal(size=rows).round(3)
    return pl.DataFrame(
        {
            "user_id": random.integers(1, 9, rows), "item_id": random.integers(100, 120, rows),
            "timestamp": START_S + random.integers(0, seconds, rows),
            "click": random.integers(0, 2, rows), "buy": random.integers(0, 2, rows).astype(bool),
            "rank": [None if i % 7 == 0 else float(x) for i, x in enumerate(rank)],
            "page": random.integers(0, 50, rows),
            "device": [random.choice(["phone", "tv", None]) for _ in range(rows)],
            "best_score_click": random.random(rows).round(3), "best_score_buy": random.random(rows).round(3),
            "note": ["x"] * rows,
        }
    )  # fmt: skip


def test_impressions_table(tmp_path: Path) -> None:
    events, shown = small_log(), impressions_table()
    border = START_S + 250
    data = prepared(
        tmp_path, events, impressions=shown, context=("rank", "page", "device"), validation_from=str(border),
        test_from=str(START_S + 320), keep_duplicates=True,
    )  # fmt: skip
    assert data.manifest.tasks == ("click", "buy")
    assert [(c.name, c.kind) for c in data.manifest.context] == [
        ("rank", "number"), ("page", "number"), ("device", "category"),
    ]  # fmt: skip
    train = shown.filter(pl.col("timestamp") < border)
    for column in data.manifest.context[:2]:
        assert column.mean == pytest.approx(train[column.name].mean(), abs=1e-6)
        assert column.std == pytest.approx(train[column.name].std(ddof=0), abs=1e-6)
    assert data.manifest.options["unused_impression_columns"] == ["note"]

    times: dict[Any, list[int]] = {}
    for row in events.iter_rows(named=True):
        times.setdefault(row["user_id"], []).append(row["timestamp"])
    made = {(r.user, r.time_us // SECOND_US): r for r in requests_of(data)}
    groups = shown.group_by("user_id", "timestamp", maintain_order=True)
    assert len(made) == len(requests_of(data)) == groups.len().height
    devices: dict[str | None, float | None] = {None: None}
    for (user, time), group in groups:
        request = made[user, time]
        assert request.split == ("train" if time < border else "validation" if time < START_S + 320 else "test")
        assert request.num_known == sum(t < time for t in times.get(user, []))
        assert list(request.items) == group["item_id"].to_list()
        assert list(request.labels) == [(row["click"], int(row["buy"])) for row in group.iter_rows(named=True)]
        assert set(request.sources) == {"given"}
        for (rank, page, device), row in zip(request.context, group.iter_rows(named=True), strict=True):
            assert rank == (None if row["rank"] is None else pytest.approx(row["rank"], rel=1e-6))
            assert page == row["page"]
            assert devices.setdefault(row["device"], device) == device
    buckets = [bucket for bucket in devices.values() if bucket is not None]
    assert len(set(buckets)) == 2
    assert all(0 <= bucket < NUM_CONTEXT_BUCKETS for bucket in buckets)


def test_best_scores_lie_beside_their_impressions(tmp_path: Path) -> None:
    shown = impressions_table()
    data = prepared(tmp_path, small_log(), impressions=shown, validation_fraction=0.0, test_fraction=0.0)
    wanted = shown.sort("user_id", "timestamp", maintain_order=True)
    train = data.impressions("train")
    assert train.best_score is not None
    scores = wanted.select("best_score_click", "best_score_buy").to_numpy().astype(np.float32)
    np.testing.assert_array_equal(train.best_score, scores)
    one = prepared(tmp_path, small_log(), impressions=shown.rename({"best_score_buy": "best_score"}), tasks=("buy",))
    assert one.impressions("train").best_score.shape[1] == 1  # type: ignore[union-attr]
    none = prepared(tmp_path, small_log(), impressions=shown.drop("best_score_buy"))
    assert none.impressions("train").best_score is None


def test_users_and_items_that_were_only_shown(tmp_path: Path) -> None:
    """A user without events is cold but real; an item nobody met is an item."""
    columns = ["user_id", "item_id", "timestamp", "click"]
    only_shown = impressions_table()[:3].with_columns(user_id=pl.lit(99, pl.Int64), item_id=pl.lit(500, pl.Int64))
    shown = pl.concat([impressions_table(), only_shown]).select(columns)
    data = prepared(tmp_path, small_log(), impressions=shown)
    user = data.user_index(99)
    assert user is not None
    assert data.histories.lengths()[user] == 0
    cold = [request for request in requests_of(data) if request.user == 99]
    assert cold
    assert all(request.num_known == 0 and set(request.items) == {500} for request in cold)
    without = prepared(tmp_path, small_log(), impressions=shown, min_user_events=2)
    assert without.user_index(99) is None


# --- split -----------------------------------------------------------------------------------------------------------


def test_shares_of_the_requests_by_time(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log(events=600), validation_fraction=0.2, test_fraction=0.1)
    requests = requests_of(data)
    times = sorted(request.time_us for request in requests)
    assert data.manifest.test_from_us == times[len(times) - round(0.1 * len(times))]
    assert data.manifest.validation_from_us == times[len(times) - round(0.3 * len(times))]
    for request in requests:
        later = [request.time_us >= border for border in (data.manifest.validation_from_us, data.manifest.test_from_us)]
        assert request.split == ("train", "validation", "test")[sum(later)]


def test_given_borders_hold(tmp_path: Path) -> None:
    borders = {"validation_from": "2020-09-13T12:30:00", "test_from": str(START_S + 300)}
    data = prepared(tmp_path, small_log(), **borders)
    assert data.manifest.validation_from_us == (START_S + 200) * SECOND_US  # START_S is 12:26:40
    assert data.manifest.test_from_us == (START_S + 300) * SECOND_US
    assert {request.split for request in requests_of(data)} == {"train", "validation", "test"}


# --- the future ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """All tables of a log of some seconds."""

    events: pl.DataFrame
    items: pl.DataFrame
    impressions: pl.DataFrame

    @classmethod
    def random(cls, seed: int) -> Tables:
        random = np.random.default_rng(seed)
        events = small_log(seed, users=6, items=15, events=150, seconds=100)
        ids = np.arange(100, 130)
        items = pl.DataFrame({"item_id": ids, "genre": [f"g{i}" for i in random.integers(0, 3, 30)]})
        return cls(events, items, impressions_table(seed, seconds=100))

    def with_other_future(self, since: int, seed: int) -> Tables:
        """The same before a time; from it on other users, items, actions, in a log of another length and order."""
        random = np.random.default_rng(seed)
        number = int(random.integers(5, 200))
        future = pl.DataFrame(
            {
                "user_id": random.integers(-3, 20, number), "item_id": random.integers(90, 140, number),
                "timestamp": since + random.integers(0, 50, number),
                "action": random.choice(["a new one", "view", "zoom"], number),
            }
        )  # fmt: skip
        shown = impressions_table(seed + 1, number).with_columns(
            user_id=pl.Series(random.integers(-3, 20, number)), item_id=pl.Series(random.integers(90, 140, number)),
            timestamp=pl.Series(since + random.integers(0, 50, number)), device=pl.lit("watch"),
        )  # fmt: skip
        return replace(
            self, events=interleaved(self.events, future, since, random),
            impressions=interleaved(self.impressions, shown, since, random),
        )  # fmt: skip


def interleaved(table: pl.DataFrame, future: pl.DataFrame, since: int, random: np.random.Generator) -> pl.DataFrame:
    """The rows before a time, in their order, and those of another future, anywhere between them."""
    past = table.filter(pl.col("timestamp") < since)
    rows = pl.concat([past, future.select(past.columns)], how="vertical_relaxed")
    return rows.with_columns(
        place=pl.Series(np.concatenate([np.sort(random.random(len(past))), random.random(len(future))]))
    ).sort("place").drop("place")  # fmt: skip


def known_before(data: PreparedData, since: int) -> list[tuple[Any, ...]]:
    """All that a model may see of each request before a time, and its labels.

    Items known in training by index, others by id: what stands for them is their embedding row, an unknown bucket's.
    """
    histories, catalogue = data.histories, data.catalogue
    seen = []
    for r in requests_of(data):
        if r.time_us < since * SECOND_US:
            first = int(histories.offsets[data.user_index(r.user)])
            known = slice(first, first + r.num_known)
            of_items = np.concatenate([histories.item[known], r.indices])
            rows, codes = catalogue.embedding_row[of_items], catalogue.features[of_items]
            ids = catalogue.decode(of_items)
            items = [i if i < catalogue.num_rows else key for i, key in zip(of_items.tolist(), ids, strict=True)]
            events = (histories.action[known].tolist(), histories.timestamp_us[known].tolist())
            seen.append((replace(r, indices=()), items, *events, rows.tolist(), codes.tolist()))
    return seen


@pytest.mark.parametrize("given_impressions", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_future_changes_nothing_before_it(seed: int, given_impressions: bool, tmp_path: Path) -> None:
    """Training ends before the time at which the two futures part, or at it."""
    since, training_ends = START_S + 70, START_S + (70 if seed % 2 else 50)
    tables = Tables.random(seed)
    seen, catalogues, contexts = [], [], []
    for version in (tables, tables.with_other_future(since, 10 + seed), tables.with_other_future(since, 20 + seed)):
        options: dict[str, Any] = {"items": version.items, "events_per_partition": 40}
        if given_impressions:
            options |= {"impressions": version.impressions, "context": ("rank", "device")}
        data = prepared(tmp_path, version.events, validation_from=str(training_ends), test_from=str(since), **options)
        seen.append(known_before(data, since))
        first, last = data.catalogue.first_item, data.catalogue.num_rows
        catalogues.append((last, data.catalogue.ids[: last - first].tolist()))  # those known in training come first
        contexts.append(data.manifest.context)
        assert any(request.split == "test" for request in requests_of(data))
    assert len(seen[0]) > 30
    assert any(row[1] for row in seen[0])
    assert seen[0] == seen[1] == seen[2]
    assert catalogues[0] == catalogues[1] == catalogues[2]
    assert contexts[0] == contexts[1] == contexts[2]


def test_the_past_changes_what_comes_after(tmp_path: Path) -> None:
    """The test above can fail: one event less in the past, and requests after it are others."""
    since, tables = START_S + 70, Tables.random(0)
    borders = {"validation_from": str(since), "test_from": str(since)}
    first = tables.events.sort("timestamp")
    whole = prepared(tmp_path, first, items=tables.items, **borders)
    less = prepared(tmp_path, first[1:], items=tables.items, **borders)
    assert known_before(whole, since) != known_before(less, since)


# --- a log for a model trained before --------------------------------------------------------------------------------


def test_new_events_in_the_terms_of_older_data(tmp_path: Path) -> None:
    old = prepared(tmp_path, small_log(), validation_from=str(START_S + 300))
    log = small_log(7, items=25, seconds=900).with_columns(pl.col("action").replace("buy", "return"))
    new = prepared(tmp_path, log, catalogue=str(old.folder), keep_duplicates=True)
    assert new.catalogue.fingerprint == old.catalogue.fingerprint
    assert new.manifest.actions == old.manifest.actions
    known = set(old.catalogue.ids.tolist())
    assert histories_of(new) == {
        user: [
            (item if item in known else None, None if action == "return" else action, time)
            for item, action, time in history
        ]
        for user, history in plain_histories(log).items()
    }
    assert new.manifest.options["unknown_actions"] == ["return"]
    assert any(line.endswith("taken as not given: return") for line in summary_lines(new.manifest))
    unknown = sorted(set(log["item_id"].to_list()) - known)
    assert unknown
    index = new.catalogue.encode(unknown)
    assert set(index.tolist()) <= set(new.histories.item.tolist())
    assert (index < new.catalogue.first_item).all()


# --- manifest, checksums, command ------------------------------------------------------------------------------------


def test_verify_finds_what_was_changed(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    assert verify(data.folder) == Manifest.load(data.folder)
    files = {p.relative_to(data.folder).as_posix() for p in data.folder.rglob("*") if p.is_file()}
    assert files == {*data.manifest.checksums, "manifest.json"}
    for name in data.manifest.checksums:
        changed = tmp_path / "changed"
        shutil.copytree(data.folder, changed)
        content = bytearray((changed / name).read_bytes())
        content[-1] ^= 1
        (changed / name).write_bytes(content)
        with pytest.raises(StaleOutput, match=f"{Path(name).name} was changed"):
            verify(changed)
        (changed / name).unlink()
        with pytest.raises(StaleOutput, match=f"{Path(name).name} is missing"):
            verify(changed)
        shutil.rmtree(changed)


def test_command_prints_what_it_found(tmp_path: Path) -> None:
    code, out, _ = vista_prepare(one_csv(small_log(), tmp_path), "--out", str(tmp_path / "out"), "--max-history", "5")
    assert code == 0
    assert "40 events of 8 users, 20 items, 3 actions; 2020-09-13" in out
    assert "timestamps: epoch numbers in s, inferred from their size" in out
    assert "left out: 120 oldest events of 8 histories above 5" in out
    assert f"next: vista train {tmp_path / 'out'} --out RUN" in out


def test_command_prints_json_and_takes_every_table(tmp_path: Path) -> None:
    items, shown = write(items_table(), tmp_path / "items.parquet"), write(impressions_table(), tmp_path / "shown.csv")
    code, out, err = vista_prepare(
        one_parquet(small_log(), tmp_path), "--out", str(tmp_path / "out"), "--json", "--items", items,
        "--impressions", shown, "--task", "buy", "--context", "device", "--context", "rank",
        "--item-feature", "year", "--item-feature", "vector", "--unknown-buckets", "4",
    )  # fmt: skip
    assert code == 0, err
    manifest = json.loads(out)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tasks"] == ["buy"]
    assert [column["name"] for column in manifest["context"]] == ["device", "rank"]
    catalogue = PreparedData.open(tmp_path / "out").catalogue
    assert (catalogue.feature_names, set(catalogue.vectors), catalogue.first_item) == (("year",), {"vector"}, 5)


def test_an_empty_out_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = vista_prepare(one_csv(small_log(), tmp_path), "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert verify(tmp_path / "out").statistics["num_users"] == 8
