"""The measurement behind `vista plan`: it runs, and what it prints are the options the command takes."""

from __future__ import annotations

import shlex
import sys

import pytest
from bench import plan as bench
from typer.testing import CliRunner

from vista.cli.main import app
from vista.planning.rates import RATE_NAMES


def test_it_prints_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--size", "tiny", "--repeats", "1"])
    monkeypatch.setattr(bench, "USERS", 8)
    monkeypatch.setattr(bench, "LONG", 2)
    monkeypatch.setattr(bench, "BATCHES", {bench.FEW: 2, bench.MANY: 2})
    bench.main()
    options = capsys.readouterr().out.splitlines()[1]
    assert [word for word in shlex.split(options) if word.startswith("--")] == [
        f"--{name.replace('_', '-')}" for name in RATE_NAMES
    ]
    words = ["plan", "--users", "1e6", "--events-per-day", "5", "--history", "50", "--size", "tiny"]
    result = CliRunner().invoke(app, [*words, *shlex.split(options)])
    assert result.exit_code == 0, result.output
    assert all(f"--{name.replace('_', '-')}" in result.output for name in RATE_NAMES)
