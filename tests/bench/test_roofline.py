"""The benchmarks of speed on a CPU run whole, on a few events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "error", *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_roofline_compares_every_operation_with_the_machine(tmp_path: Path) -> None:
    out = run("bench/roofline.py", "--lengths", "256", "512", "--users", "2", "--repeats", "1", "--candidates", "8",
              "--width", "32", "--clock", "processor", "--out", str(tmp_path))  # fmt: skip
    rows = json.loads((tmp_path / "roofline.json").read_text())["rows"]
    names = {"operator", "slots", "layer", "summarize, 1 users", "summarize, 2 users"}
    assert {row["operation"] for row in rows} == names | {"rank, 4 users after 512 events"}
    assert all(0 < row["achieved/matmul"] <= row["achieved/possible"] for row in rows)
    assert rows[-1]["time_to_shortest"] > 0
    assert out.count("\n| ") == len(rows)


def test_peers_alternate_with_ours_and_a_missing_one_is_named(tmp_path: Path) -> None:
    out = run("bench/peers.py", "--lengths", "128", "256", "512", "--peers", "softmax", "hstu", "meta-hstu", "--width",
              "32", "--repeats", "1", "--memories", "slots", "--out", str(tmp_path))  # fmt: skip
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert {(row["peer"], row["gradients"]) for row in rows} == {
        (peer, gradients) for peer in ("softmax", "hstu") for gradients in (False, True)
    }
    assert "left out: meta-hstu" in out
