"""The demo runs, says what it does, and what it says can be typed."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.test_docs import check_vista
from vista.cli.main import app
from vista.cli.serve import serve
from vista.data.prepare import PrepareOptions
from vista.data.worlds import WorldOptions
from vista.demo import Demo, DemoSize, run_demo
from vista.errors import StaleOutput

TINY = DemoSize(WorldOptions(users=24, events=260, requests=16, settings={"phase_events": 40}), steps=4)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, str]:
    screen = StringIO()
    demo = run_demo(tmp_path_factory.mktemp("d") / "demo", size=TINY, console=Console(file=screen, width=200))
    return demo, screen.getvalue()


def test_it_ends_with_the_table_and_the_report(shown: tuple[Demo, str]) -> None:
    demo, screen = shown
    table = screen[screen.index("$ vista evaluate") :]
    for row in ("vista", "recent", "counts", "best possible"):
        assert re.search(rf"{row}.*0\.\d+", table), f"no row {row} in {table}"
    assert f"report: {demo.report}" in table
    assert demo.report.exists()


def test_it_ends_with_how_to_serve_what_it_made(shown: tuple[Demo, str]) -> None:
    """The command starts, the address is that of the page, and the page's endpoints know the demo's users."""
    _, screen = shown
    command, line = screen.rstrip().splitlines()[-2:]
    words = shlex.split(command.removeprefix("$ "))
    address = line.split()[-1]
    defaults = inspect.signature(serve).parameters
    assert address == f"http://{defaults['host'].default}:{defaults['http_port'].default}/ui"
    process = subprocess.Popen(
        [sys.executable, "-m", "vista.cli.main", *words[1:], "--http-port", "0", "--grpc-port", "0"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        page = json.loads(process.stderr.readline())["page"]
        assert httpx.get(page, timeout=20).status_code == 200
        base = page.removesuffix("/ui")
        user = httpx.get(f"{base}/v1/users?limit=1", timeout=20).json()["users"][0]["user"]
        found = httpx.get(f"{base}/v1/tokens/{user}", timeout=20).json()
        assert found["num_traced"] == found["num_summarized"] > 200, "whole histories come from the prepared data"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_it_prints_can_be_typed(shown: tuple[Demo, str]) -> None:
    """Each command exists with its options, and the rank command gives the printed scores."""
    _, screen = shown
    commands = [shlex.split(line[2:]) for line in screen.splitlines() if line.startswith("$ vista")]
    assert [words[1] for words in commands] == [
        "data",
        "prepare",
        "train",
        "train",
        "train",
        "summarize",
        "rank",
        "evaluate",
        "serve",
    ]
    for words in commands:
        assert not check_vista(words), check_vista(words)
    (rank,) = (words for words in commands if words[1] == "rank")
    result = CliRunner().invoke(app, [*rank[1:], "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    printed = dict(re.findall(r"^item (\S+): (\S+)$", screen, re.MULTILINE))
    assert printed == {str(c): f"{s:.3f}" for c, s in zip(answer["candidates"], answer["scores"], strict=True)}


def test_a_log_of_ones_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(30), 80)
    times = 1_700_000_000 + np.cumsum(rng.integers(60, 7_200, (30, 80)), axis=1).ravel()
    log = pl.DataFrame({"who": users, "what": rng.integers(0, 40, len(users)), "timestamp": times})
    log.write_parquet(tmp_path / "log.parquet")
    options = PrepareOptions(str(tmp_path / "log.parquet"), user_column="who", item_column="what")
    screen = StringIO()
    demo = run_demo(tmp_path / "demo", options, TINY, Console(file=screen, width=200))
    assert "--user-column who --item-column what" in screen.getvalue()
    assert demo.runs["vista"].schema.tasks == ("next",)
    assert "best possible" not in screen.getvalue()


def test_it_does_not_write_over_anything(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StaleOutput, match="choose another --out"):
        run_demo(tmp_path, size=TINY)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_items_need_events() -> None:
    result = CliRunner().invoke(app, ["demo", "--items", "items.csv"])
    assert result.exit_code == 2
    assert "--events" in result.stderr
