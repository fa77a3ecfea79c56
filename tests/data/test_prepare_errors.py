"""Wrong tables, options or machines: a message that says where, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from tests.data.small_logs import START_S, small_log, write
from vista.cli.main import app

LOG = small_log()
IDS = {"user_id": [1, 2], "item_id": [100, 101]}


def fails(folder: Path, *args: str) -> str:
    """The message of ``vista prepare ARGS --out FOLDER/out``, which must fail and leave everything as it was."""
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, ["prepare", *args, "--out", str(folder / "out")])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before
    lines = [line for line in result.stderr.splitlines() if not line.startswith("prepare")]  # progress
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def with_value(row: int, **values: Any) -> pl.DataFrame:
    """The log with some cells of one row, counted from 1, replaced."""
    at_row = pl.int_range(pl.len()) == row - 1
    return LOG.with_columns(pl.when(at_row).then(pl.lit(v)).otherwise(pl.col(n)).alias(n) for n, v in values.items())


# --- files -----------------------------------------------------------------------------------------------------------


def missing(folder: Path) -> str:
    return str(folder / "log.parquet")


def folder_without_tables(folder: Path) -> str:
    (folder / "log").mkdir()
    (folder / "log" / "README.txt").touch()
    return str(folder / "log")


def other_kind(folder: Path) -> str:
    (folder / "log.xlsx").touch()
    return str(folder / "log.xlsx")


def empty_csv(folder: Path) -> str:
    (folder / "log.csv").touch()
    return str(folder / "log.csv")


def empty_parquet(folder: Path) -> str:
    (folder / "log.parquet").touch()
    return str(folder / "log.parquet")


def csv_with_header_only(folder: Path) -> str:
    return write(LOG[:0], folder / "log.csv")


def parquet_without_rows(folder: Path) -> str:
    return write(LOG[:0], folder / "log.parquet")


def truncated_parquet(folder: Path) -> str:
    write(LOG, folder / "a.parquet")
    content = (folder / "a.parquet").read_bytes()
    (folder / "log.parquet").write_bytes(content[: len(content) // 2])
    return str(folder / "*.parquet")


def corrupt_parquet(folder: Path) -> str:
    """The header and the footer are there, what is between is not."""
    path = Path(write(LOG, folder / "log.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\0" * 400 + content[440:])
    return str(path)


def truncated_gzip(folder: Path) -> str:
    (folder / "log.csv.gz").write_bytes(gzip.compress(LOG.write_csv().encode())[:-300])
    return str(folder / "log.csv.gz")


FILES = {
    missing: ["log.parquet: no events there", "a folder of them, or a quoted glob"],
    folder_without_tables: ["log: no events there"],
    other_kind: ["log.xlsx: neither Parquet nor CSV by its name", ".csv.gz"],
    empty_csv: ["log.csv: the file is empty"],
    empty_parquet: ["log.parquet: cannot be read (truncated?)"],
    csv_with_header_only: ["log.csv: the event log has no rows"],
    parquet_without_rows: ["log.parquet: the event log has no rows"],
    truncated_parquet: ["log.parquet: cannot be read (truncated?)", "Check or re-create the file"],
    corrupt_parquet: ["log.parquet: cannot be read"],
    truncated_gzip: ["log.csv.gz: cannot be read", "unexpected end of file"],
}


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_files(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = fails(tmp_path, make(tmp_path))
    assert all(part in message for part in FILES[make]), message


# --- values of the event log -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A log that is wrong in row 7 of its second file, options for it, and parts of the message."""

    log: pl.DataFrame
    parts: tuple[str, ...]
    args: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".parquet", ".csv")


TEXT_TIME = pl.col("timestamp").cast(pl.String)
VALUES = {
    "missing column": Bad(
        LOG.rename({"user_id": "userid"}), ("no column 'user_id'; did you mean 'userid'?", "with --user-column")
    ),
    "missing column that was named": Bad(
        LOG, ("no column 'kind'; there is: action, item_id, timestamp, user_id. ", "with --action-column"),
        ("--action-column", "kind"),
    ),
    "null user": Bad(with_value(107, user_id=None), ("row 7, column 'user_id': null is not an id",)),
    "null item": Bad(with_value(107, item_id=None), ("row 7, column 'item_id': null is not an id",)),
    "null time": Bad(with_value(107, timestamp=None), ("row 7, column 'timestamp': null is not a time",)),
    "time that is text": Bad(
        LOG.with_columns(TEXT_TIME).with_columns(
            timestamp=pl.when(pl.int_range(pl.len()) == 106).then(pl.lit("yesterday")).otherwise(TEXT_TIME)
        ),
        ("row 7, column 'timestamp': 'yesterday' is not",),
    ),
    "time not a number": Bad(
        with_value(107, timestamp=float("nan")), ("row 7, column 'timestamp': 'NaN' is not a time",)
    ),
    "year 1970": Bad(
        with_value(107, timestamp=86_400),
        ("row 7, column 'timestamp': 86400 is 1970-01-02 00:00:00 UTC", "outside 1990-01-01", "--earliest"),
    ),
    "year 2100": Bad(
        with_value(107, timestamp=4_102_444_800),
        ("row 7, column 'timestamp': 4102444800 is 2100-01-01 00:00:00 UTC", "--latest"),
    ),
    "milliseconds among seconds": Bad(
        with_value(107, timestamp=START_S * 1000),
        (f"row 7, column 'timestamp': {START_S}000 is +50702 years from 1970", "in s, inferred", "--time-unit"),
    ),
    "later than allowed": Bad(
        with_value(107, timestamp=START_S + 500),
        ("row 7, column 'timestamp': 1600000500 is 2020-09-13 12:35:00 UTC", ".. 2020-09-13 12:34:00 UTC"),
        ("--latest", "2020-09-13T12:34"),
    ),
    "fractions as ids": Bad(
        with_value(107, item_id=1.5), ("column 'item_id': type Float64; ids are integers or strings",)
    ),
    "dates as ids": Bad(
        LOG.with_columns(item_id=pl.from_epoch("timestamp").dt.date()),
        ("column 'item_id': type Date; ids are integers or strings",),
    ),
    "too large an id": Bad(
        LOG.with_columns(user_id=pl.Series([1] * 106 + [2**63] + [1] * 53, dtype=pl.UInt64)),
        ("row 7, column 'user_id': '9223372036854775808' is above the largest integer id", "convert the column"),
        suffixes=(".parquet",),
    ),
    "lists as times": Bad(
        LOG.with_columns(timestamp=pl.concat_list("timestamp")),
        ("column 'timestamp': type List(Int64) is not a time",), suffixes=(".parquet",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, tmp_path: Path) -> None:
    bad = VALUES[name]
    for suffix in bad.suffixes:
        folder = tmp_path / suffix
        files = [folder / "log" / f"{number}{suffix}" for number in (1, 2)]
        write(bad.log[:100], files[0])
        write(bad.log[100:], files[1])
        message = fails(folder, str(folder / "log"), *bad.args)
        assert all(part in message for part in bad.parts), message
        if "row 7" in bad.parts[0]:
            assert message.startswith(f"{files[1]}, row 7"), message


@pytest.mark.parametrize(
    ("cell", "part"), [("x7,5,16e8,v", "'16e8' is not"), ("1,5,1600000000,v,w", "more cells than")]
)
def test_a_row_beyond_those_a_csv_is_judged_by(cell: str, part: str, tmp_path: Path) -> None:
    rows = [f"{i % 50},{i % 90},{START_S + i},v\n" for i in range(10_500)]
    header = "user_id,item_id,timestamp,action\n"
    (tmp_path / "log.csv").write_text(header + "".join([*rows, cell + "\n", *rows]))
    message = fails(tmp_path, str(tmp_path / "log.csv"))
    assert message.startswith(f"{tmp_path / 'log.csv'}, row 10501")
    assert part in message


def test_numbers_here_and_dates_there(tmp_path: Path) -> None:
    write(LOG, tmp_path / "1.parquet")
    write(LOG.with_columns(pl.from_epoch("timestamp")), tmp_path / "2.parquet")
    assert "column 'timestamp': numbers in some files, dates in others" in fails(tmp_path, str(tmp_path))


def test_actions_that_are_ids(tmp_path: Path) -> None:
    number = np.arange(33_000)
    log = pl.DataFrame({"user_id": number % 9, "item_id": number % 7, "timestamp": START_S + number, "action": number})
    message = fails(tmp_path, write(log, tmp_path / "log.parquet"))
    assert "column 'action' has 33000 different values" in message
    assert "--action-column" in message


# --- the other tables ------------------------------------------------------------------------------------------------

ITEMS = {
    "repeated": ({"item_id": [100, 101, 100], "genre": list("abc")}, ["row 1: item 100 is there more than once"]),
    "null id": ({"item_id": [100, None], "genre": list("ab")}, ["row 2, column 'item_id': None is not an integer"]),
    "text ids": ({"item_id": ["100", "x7"], "genre": list("ab")}, ["row 2, column 'item_id': 'x7' is not an integer"]),
    "no id column": ({"id": [100], "genre": ["a"]}, ["no column 'item_id'; there is: genre, id. ", "--item-column"]),
    "widths": ({"item_id": [1, 2], "v": [[1.0, 2.0], [1.0]]}, ["row 2, column 'v': a vector of 1 numbers, others"]),
    "no numbers": ({"item_id": [1], "v": pl.Series([[]], dtype=pl.List(pl.Float32))}, ["column 'v': vectors without"]),
    "infinite": ({"item_id": [1, 2], "v": [[1.0], [float("inf")]]}, ["row 2, column 'v': a number that is null"]),
    "null in vector": ({"item_id": [1, 2], "v": [[1.0], [None]]}, ["row 2, column 'v': a number that is null"]),
    "not finite": ({"item_id": [1, 2], "v": [1.0, float("nan")]}, ["row 2, column 'v': a number that is null"]),
    "no rows": ({"item_id": pl.Series([], dtype=pl.Int64)}, ["no rows in the items table"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ITEMS)
def test_items(name: str, tmp_path: Path) -> None:
    values, parts = ITEMS[name]
    items = write(pl.DataFrame(values), tmp_path / "items.parquet")
    message = fails(tmp_path, write(LOG, tmp_path / "log.parquet"), "--items", items)
    assert items in message
    assert all(part in message for part in parts), message


def test_items_of_two_files_with_other_columns(tmp_path: Path) -> None:
    write(pl.DataFrame({"item_id": [1], "genre": ["a"]}), tmp_path / "items" / "1.csv")
    write(pl.DataFrame({"item_id": [2], "type": ["a"]}), tmp_path / "items" / "2.csv")
    message = fails(tmp_path, write(LOG, tmp_path / "log.parquet"), "--items", str(tmp_path / "items"))
    assert "2.csv: columns ['item_id', 'type'], " in message
    assert "1.csv has ['item_id', 'genre']" in message


def test_a_repeated_item_in_another_file(tmp_path: Path) -> None:
    for number, ids in enumerate([[1, 2, 3], [4, 5, 4]]):
        write(pl.DataFrame({"item_id": ids, "genre": list("abc")}), tmp_path / "items" / f"{number}.parquet")
    message = fails(tmp_path, write(LOG, tmp_path / "log.parquet"), "--items", str(tmp_path / "items"))
    assert f"{tmp_path / 'items' / '1.parquet'}, row 1: item 4 is there more than once" in message


SHOWN = {**IDS, "timestamp": [START_S + 9, START_S + 10], "click": [0, 1]}
IMPRESSIONS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "label of 2": ({"click": [0, 2]}, ["--task", "click"], ["row 2, column 'click': 2 is not a label; labels are"]),
    "null label": ({"click": [0, None]}, ["--task", "click"], ["row 2, column 'click': None is not a label"]),
    "text label": ({"click": ["y", "n"]}, ["--task", "click"], ["column 'click': type String; a label is 0 or 1"]),
    "no label": ({"click": [0.5, 0.2]}, [], ["no column holds nothing but 0 and 1", "--task (there is: click)"]),
    "no such task": ({}, ["--task", "clicks"], ["no column 'clicks'; did you mean 'click'?", "--task"]),
    "no such context": ({}, ["--context", "page"], ["no column 'page'", "--context"]),
    "both": ({}, ["--task", "click", "--context", "click"], ["'click' is named as --task and as --context"]),
    "infinite": ({"x": [0.5, float("inf")]}, ["--context", "x"], ["row 2, column 'x': not a finite number"]),
    "dates": ({"x": [[1], [2]]}, ["--context", "x"], ["column 'x': type List(Int64); context is numbers or strings"]),
    "null user": ({"user_id": [1, None]}, [], ["row 2, column 'user_id': None is not an integer"]),
    "text user": ({"user_id": ["1", "bob"]}, [], ["row 2, column 'user_id': 'bob' is not an integer"]),
    "absurd time": ({"timestamp": [START_S, 10]}, [], ["row 2, column 'timestamp': 10 is 1970-01-01 00:00:10 UTC"]),
    "best score": ({"best_score": [0.5, 1.5]}, [], ["row 2, column 'best_score': not a probability"]),
    "no rows": ({n: pl.Series([], dtype=pl.Int64) for n in SHOWN}, [], ["no rows in the impressions table"]),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPRESSIONS)
def test_impressions(name: str, tmp_path: Path) -> None:
    values, args, parts = IMPRESSIONS[name]
    shown = write(pl.DataFrame({**SHOWN, **values}), tmp_path / "shown.parquet")
    message = fails(tmp_path, write(LOG, tmp_path / "log.parquet"), "--impressions", shown, *args)
    assert all(part in message for part in parts), message


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "--max-history 0": "--max-history 0: at least 1",
    "--time-unit min": "--time-unit min: one of s, ms, us, ns",
    "--earliest soon": "--earliest 'soon': not a date",
    "--validation-from soon": "--validation-from 'soon': not a date",
    "--validation-from 2020-09-14 --test-from 2020-09-13": "--validation-from lies after --test-from",
    "--validation-fraction 0.6 --test-fraction 0.4": "together less than 1",
    "--validation-from 2020-01-01": "no training request",
    "--task click": "give --impressions as well",
    "--item-feature genre": "give --items",
    "--popularity-negatives 0 --category-negatives 0": "a request needs a candidate beside its positive",
    "--new-items --history-negatives 2": "those are items the user had met; leave one of the two out",
    "--new-items --impressions shown.csv": "--new-items is for requests made from events",
    "--min-user-events 1000": "no event is left after the rules",
    "--burst-column basket": "no column 'basket'",
    "--catalogue .": "neither a run (schema.json) nor prepared data (manifest.json)",
}


@pytest.mark.parametrize("args", OPTIONS)
def test_options(args: str, tmp_path: Path) -> None:
    assert OPTIONS[args] in fails(tmp_path, write(LOG, tmp_path / "log.parquet"), *args.split())


def test_a_category_feature_that_is_not_there(tmp_path: Path) -> None:
    items = write(pl.DataFrame({"item_id": [100, 101], "genre": ["a", "b"]}), tmp_path / "items.parquet")
    args = ["--items", items, "--category-feature", "genres"]
    message = fails(tmp_path, write(LOG, tmp_path / "log.parquet"), *args)
    assert message == "--category-feature 'genres': no such feature; did you mean 'genre'?"


def test_a_log_of_which_no_request_can_be_made(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": [1] * 5, "item_id": np.arange(5), "timestamp": START_S + np.arange(5)})
    message = fails(tmp_path, write(log, tmp_path / "log.parquet"))
    assert "no request could be made from 5 events" in message
    assert "unseen_positive=5" in message


def test_out_is_in_the_way(tmp_path: Path) -> None:
    log = write(LOG, tmp_path / "log.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "out is there already: remove it, or choose another --out" in fails(tmp_path, log)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "thesis.txt").unlink()
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("mine")
    assert "out is there already" in fails(tmp_path, log)


# --- the machine -----------------------------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITERS = {
    "vista.data.prepare.ArrayWriter.append": NO_SPACE,
    "vista.data.split.save_array": NO_SPACE,
    "vista.data.prepare.Manifest.save": NO_SPACE,
    "polars.DataFrame.write_parquet": pl.exceptions.ComputeError("parquet: No space left on device (os error 28)"),
    "vista.catalogue.Catalogue.save": SafetensorError("Error while serializing: I/O error: No space left on device"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write(LOG, tmp_path / "log.parquet")

    def full(*_: Any, **__: Any) -> None:
        raise WRITERS[writer]

    monkeypatch.setattr(writer, full)
    message = fails(tmp_path, log)
    assert message.startswith(f"{tmp_path / 'out'}: the disk is full")
    assert "nothing was kept" in message


@pytest.mark.parametrize("max_bytes", [2_000, 100_000, 150_000])
def test_files_that_may_not_grow(max_bytes: int, tmp_path: Path) -> None:
    """The real thing: at the first limit the partitions stop growing, at the others the arrays."""
    log = write(small_log(events=30_000, users=100, seconds=10_000), tmp_path / "log.parquet")
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({max_bytes}, {max_bytes}));"
        "from vista.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "prepare", log, "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert "the disk is full, or a limit on the size of files is reached; nothing was kept" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["log.parquet"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """A real signal, in the middle of the sort."""
    log = write(small_log(), tmp_path / "log.parquet")
    code = (
        "import pathlib, time, vista.data.sort as sort\n"
        "def slow(frame):\n"
        f"    pathlib.Path({str(tmp_path / 'reached')!r}).touch()\n"
        "    time.sleep(60)\n"
        "sort._sort = slow\n"
        "from vista.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "prepare", log, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        give_up_at = time.monotonic() + 60
        while not (tmp_path / "reached").exists() and time.monotonic() < give_up_at:
            time.sleep(0.02)
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == f"interrupted: nothing was kept of {tmp_path / 'out'}"
    assert sorted(os.listdir(tmp_path)) == ["log.parquet", "reached"]


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    events = write(LOG, tmp_path / "log.csv")
    result = CliRunner().invoke(app, ["prepare", events, "--out", f"{events}/data"])
    assert result.exit_code == 2
    assert "log.csv is a file, and not a folder to write into" in result.stderr.replace("\n", " ")


def test_a_late_word_among_numbers_of_actions_is_named_by_its_row(tmp_path: Path) -> None:
    """Also where nobody named the column."""
    lines = [f"1,{i % 90},{START_S + i},{i % 3}\n" for i in range(10_050)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,action\n" + "".join(lines) + f"1,5,{START_S},click\n")
    assert "row 10051, column 'action': 'click'" in fails(tmp_path, str(tmp_path / "log.csv"))
