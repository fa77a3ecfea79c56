"""Output folders that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vista.errors import StaleOutput


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A sibling of ``out`` to write into; it becomes ``out`` when the block ends, and is removed when it fails.

    Raises StaleOutput when ``out`` is there and not an empty folder.
    """
    above = next((folder for folder in out.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise StaleOutput(f"{out}: {above} is a file, and not a folder to write into; choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StaleOutput(f"{out} is there already: remove it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(out)  # an empty folder gives way
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was kept of {out}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
