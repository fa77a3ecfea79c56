"""The load test of the server is whole: every part measures, with sizes that show nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'vista-recsys[serve]'")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_lengths_overload_and_outage(tmp_path: Path) -> None:
    sizes = ["--lengths", "100", "1000", "--candidates", "3", "9", "--users", "2", "--rounds", "1", "--overload-s", "3",
             "--outage-s", "2", "--size", "tiny", "--out", str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "bench/serve.py", *sizes], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    facts = json.loads((tmp_path / "serve.json").read_text())
    cells = {(length, candidates) for length in (100, 1000) for candidates in (3, 9)}
    assert {(row["events"], row["candidates"]) for row in facts["lengths"]} == cells
    assert all(row["raw_ms"] > 0 for row in facts["raw"])
    assert facts["overload"]["statuses"]["200"] > 0
    for outage in facts["outages"]:
        away = "200 degraded" if outage["degrade"] else "503"
        assert outage["away"][away] > 0
        assert outage["back"]["200"] > 0
    assert (tmp_path / "serve.md").read_text() in run.stdout
