"""The benchmark for GPUs runs on a CPU, too, so that it is whole when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_every_operator_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "bench/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    whole = {"summarize", "summarize, with gradients", "train"}
    assert {row["operator"] for row in facts["rows"]} == {
        "sum", "slots", "softmax", *whole, *(f"{name}, no sketch" for name in whole)
    }  # fmt: skip
    assert run.stdout.count("\n| s") + run.stdout.count("\n| train") == len(facts["rows"])
    assert {(row["operator"], row["type"]) for row in facts["checked"]} == {
        (name, kind) for name in ("sum", "slots") for kind in ("torch.float32", "torch.bfloat16")
    }
