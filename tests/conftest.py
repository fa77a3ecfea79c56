"""Shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # test tensors are small: threads only get in each other's way
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported: no test may be the first


def shared_data(name: str) -> Path:
    """The folder of a real event log beside the repository; skips the test, with the reason, where it is absent."""
    folder = Path(__file__).parents[1].parent / "shared" / "data" / name
    if not folder.exists():
        pytest.skip(f"needs the real event log {name!r} in ../shared/data, which is not part of the repository")
    return folder
