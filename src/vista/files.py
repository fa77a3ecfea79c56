"""Writes that survive a loss of power: on disk when the call returns, and never half there."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Put a small file in its place in one atomic step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)
