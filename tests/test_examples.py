"""Every script of examples/ runs, in an empty folder, and prints something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORTER = {  # what some get here so that they end soon
    "downstream_ranker.py": ["--users", "12", "--steps", "8", "--seeds", "2", "--epochs", "1"],
}
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script), *SHORTER.get(script.name, [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout, f"{script.name} prints nothing: what should the reader see?"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example_begins_with_what_it_shows(script: Path) -> None:
    assert script.read_text().startswith('"""')
