"""Bytes are those of real records, each line of a plan follows by hand, and the page tells what the command prints."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vista import api
from vista.cli.main import app
from vista.config import resolve
from vista.errors import ConfigError
from vista.planning.plan import Demand, Machine, make_plan
from vista.planning.rates import MEASURED, RATE_NAMES, Rates, rates_for
from vista.planning.sizes import UserBytes, fresh_run, kept_bytes, user_bytes

DOCS = Path(__file__).parents[2] / "docs"
RATES = Rates(bulk_event_us=10, bulk_user_ms=1, refresh_ms=2, refresh_event_us=100, write_amplification=1.5, read_us=50)
BYTES = UserBytes(tokens=4_000, state=10_000, event=100)
DEMAND = Demand(users=864e5, events_per_day=10, history=1_000, requests_per_day=20, refresh_s=86_400, peak=1)


def rows(page: str, columns: tuple[str, ...]) -> list[list[str]]:
    """The cells of the table of a page whose first header cells are ``columns``, without backquotes and commas."""
    lines = (DOCS / page).read_text().splitlines()
    cells = [[cell.strip(" `").replace(",", "") for cell in line.strip("|").split("|")] for line in lines]
    first = next(i for i, row in enumerate(cells) if tuple(row[: len(columns)]) == columns) + 2
    end = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    return cells[first:end]


# -- bytes


def test_kept_bytes_are_those_that_were_found_in_the_engines():
    header = next(line for line in (DOCS / "store.md").read_text().splitlines() if line.startswith("| record |"))
    sizes = [int(cell.replace(",", "")) for cell in header.strip("| ").split("|")[1:]]
    for engine, *kept in rows("store.md", ("record",)):
        assert [kept_bytes(engine.lower(), size) for size in sizes] == [int(cell) for cell in kept], engine


@pytest.mark.parametrize("row", [0, 1])
def test_a_users_bytes_are_those_of_the_record_format(row):
    """That page's user has seven digits, no event ids and no marks; ours has ten, 128 ids and one mark."""
    found = rows("record-format.md", ("K", "D", "memory"))[row]
    run = fresh_run(resolve("small", overrides={"model.memory": found[2], "model.sketch_slots": 0}))
    made = user_bytes(run, 300, "int8")
    ids, mark, digits = 44 + 8 * 128, 2 * 44 + 2 * 8, 3
    assert (made.tokens, made.state) == (int(found[5]) + digits, int(found[6]) + ids + mark + digits)
    assert user_bytes(run, 10, "int8").tokens < made.tokens < user_bytes(run, 300, "float32").tokens


@pytest.mark.parametrize(("size", "most"), [("tiny", 65_536), ("small", 65_536), ("base", 300_000)])
def test_a_full_state_of_each_size_is_as_large_as_config_says(size, most):
    """A user of more different items than the sketch has room for."""
    made = user_bytes(fresh_run(resolve(size)), 20_000, "int8")
    assert 0.8 * most < made.state <= most


# -- the lines, by hand: 864e5 users with 10 events a day are 10,000 events/s


def test_a_plan_for_lmdb_by_hand():
    made = make_plan(DEMAND, BYTES, RATES, Machine(cores=10, disk_tb=1, disk_gb_per_s=0.01, network_gbit=0.1))
    per_s = 1_000 * (1 - math.exp(-10))
    expected = {
        "tokens": 864e5 * 2 * (4_096 + 82) / 1e12, "states": 864e5 * 2 * (3 * 4_096 + 82) / 1e12,
        "histories": 864e5 * 1_000 * 14 / 1e12, "events": 1e4, "refreshes": per_s,
        "refresh cores": 2 * (per_s * 2e-3 + 1e4 * 1e-4), "refresh disk": per_s * 14_000 * 2 * 1.5 / 1e9,
        "refresh network": 1e4 * 100 * 2 / 1e9, "reads": 2e4, "read cores": 1.0, "read network": 0.0,
        "core hours": (864e5 * 1_000 * 1e-5 + 864e5 * 1e-3) / 3_600, "records written": 864e5 * 14_000 * 2 / 1e12,
    }  # fmt: skip
    for name, value in expected.items():
        assert made.value(name) == pytest.approx(value), name
    assert made.value("stored") == made.value("tokens") + made.value("states")
    assert made.machines == {"replicas": 2, "room": 3, "disk writes": 5, "cores": 1, "network": 1}
    assert (made.num_machines, made.bound_by) == (5, "disk writes")
    assert made.value("on these machines") == pytest.approx(made.value("core hours") / 50)


def test_a_plan_for_redis_by_hand():
    """Servers: one process takes the events in, records cross the network, and lie in memory."""
    made = make_plan(replace(DEMAND, engine="redis"), BYTES, RATES, Machine(memory_gb=100))
    per_s = 1_000 * (1 - math.exp(-10))
    assert made.value("stored") == pytest.approx(864e5 * 2 * (4_096 + 48 + 10_240 + 48) / 1e12)
    assert made.value("refresh cores") == pytest.approx(per_s * 2e-3 + 1)
    assert made.value("refresh network") == pytest.approx((1e4 * 100 + per_s * 14_000 * 3) / 1e9)
    assert made.value("read network") == pytest.approx(2e4 * 4_000 / 1e9)
    assert made.machines["room"] == math.ceil(made.value("stored") * 1e3 / 100)


def test_short_intervals_refresh_once_per_event_and_long_ones_once_per_user():
    short, long = (make_plan(replace(DEMAND, refresh_s=seconds), BYTES, RATES, Machine()) for seconds in (0.01, 1e6))
    assert short.value("refreshes") == pytest.approx(short.value("events"), rel=1e-5)
    assert long.value("refreshes") == pytest.approx(DEMAND.users / 1e6, rel=1e-5)


def test_gpu_hours_are_there_only_where_a_rate_is_given():
    plain, given = (make_plan(DEMAND, BYTES, RATES, Machine(), rate) for rate in (0.0, 1e6))
    assert given.value("GPU hours") == pytest.approx(864e5 * 1_000 / 1e6 / 3_600)
    with pytest.raises(StopIteration):
        plain.value("GPU hours")


# -- which rates


def test_rates_are_those_of_the_size_or_the_given_ones():
    base = rates_for(resolve("base").model, {"read_us": 7.0})
    assert base.rates == replace(MEASURED["base"], read_us=7.0)
    assert (base.size, base.is_near, base.given) == ("base", False, ("read_us",))
    wide = resolve("base", overrides={"model.width": 256}).model
    assert (rates_for(wide, {}).size, rates_for(wide, {}).is_near) == ("base", True)
    assert not rates_for(wide, dict.fromkeys(RATE_NAMES, 1.0)).is_near


# -- the command


def run_plan(*words: str):
    return CliRunner().invoke(app, ["plan", "--size", "tiny", "--history", "100", *words])


def test_the_command_says_how_many_machines_and_where_times_come_from():
    result = run_plan("--users", "1e6", "--events-per-day", "50", "--read-us", "9")
    assert result.exit_code == 0, result.output
    assert result.output.count("\nrefreshed every ") == result.output.count("\nmachines with a refresh every ") == 2
    assert "refreshed every 2 h" in result.output
    assert "refreshed every 10 s" in result.output
    assert "measured at size tiny (docs/scaling.md), but --read-us as given" in result.output


def test_json_is_what_the_call_returns():
    words = ("--users", "1e6", "--events-per-day", "50", "--refresh-s", "60", "--json", "--set", "model.num_seeds=8")
    found = json.loads(run_plan(*words).output)
    demand = Demand(users=1e6, events_per_day=50, history=100, refresh_s=60)
    (made,), rates = api.plan([demand], size="tiny", overrides=["model.num_seeds=8"])
    (one,) = found["plans"]
    assert (one["machines"], one["plan"]["stored, TB"]) == (made.num_machines, made.value("stored"))
    assert rates.is_near
    assert found["rates"]["is_near"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--users", "0"], "--users 0: it must be above 0"), (["--users", "nan"], "--users nan"),
     (["--machine-cores", "-1"], "--machine-cores -1"), (["--engine", "mysql"], "lmdb or redis"),
     (["--refresh-s", "0"], "--refresh-s 0"), (["--read-us", "0"], "--read-us 0"), (["--codec", "int9"], "int8"),
     (["--size", "huge"], "--size 'huge'"), (["--set", "width"], "write it as --set"),
     (["--set", "model.model=din"], "a store does not hold"), (["--gpu-events-per-s", "-1"], "0 or more"),
     (["--run", "/no/where"], "/no/where"), (["--run", "x", "--set", "model.width=8"], "leave one of the two out")],
)  # fmt: skip
def test_bad_input_is_named(words, message):
    result = run_plan("--users", "1e6", "--events-per-day", "50", *words)
    assert result.exit_code == 2
    assert message in result.stderr


# -- the page


def test_the_page_has_the_rates_that_are_used():
    found = {row[0]: [float(cell) for cell in row[1:]] for row in rows("scaling.md", ("size", "bulk-event-us"))}
    assert found == {size: [getattr(rates, name) for name in RATE_NAMES] for size, rates in MEASURED.items()}


def test_the_page_tells_what_the_command_prints():
    """Every cluster of the page, planned again."""
    table = rows("scaling.md", ("users", "model", "store"))
    assert len(table) >= 12
    for model in dict.fromkeys(row[1] for row in table):
        mine = [row for row in table if row[1] == model]
        size, _, setting = model.partition(" ")
        demands = [
            Demand(float(users), 50, refresh_s={"2 h": 7_200.0, "10 s": 10.0}[interval], engine=engine)
            for users, _, engine, interval, *_ in mine
        ]
        plans, _ = api.plan(demands, size=size, overrides=[f"model.{setting}"] if setting else [])
        for row, made in zip(mine, plans, strict=True):
            names = ("stored", "refreshes", "refresh disk", "refresh cores", "refresh network")
            shown = [f"{made.value(name):.2g}" for name in names]
            assert [f"{float(cell):.2g}" for cell in row[4:9]] == shown, row
            assert row[9:] == [str(made.num_machines), made.bound_by], row


PAPER = {"model.width": 256, "model.num_layers": 3, "model.num_heads": 8, "model.sketch_slots": 0}


def test_the_page_compares_with_the_paper_by_real_bytes():
    """3e9 users with 128 x 256 numbers: 98 TB in int8, says the paper; ours has scales, recent events and a header."""
    text = (DOCS / "scaling.md").read_text()
    run = fresh_run(resolve("base", overrides=PAPER))
    made = user_bytes(run, 300, "int8")
    told = re.search(r"tokens records of ([\d,]+) bytes, ([\d.]+) TB", text)
    assert told, "the sentence on the paper's bytes is not there"
    assert int(told[1].replace(",", "")) == made.tokens
    assert float(told[2]) == round(3e9 * made.tokens / 1e12, 1)
    assert round(3e9 * 128 * 256 / 1e12) == 98


def test_bytes_reject_an_unknown_engine():
    with pytest.raises(ConfigError, match="lmdb or redis"):
        kept_bytes("mysql", 1)
