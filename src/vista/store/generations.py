"""The folders of an LMDB store: one per generation, and a pointer to the one in use.

    PATH/
      CURRENT       the number of the generation in use
      1/            data.mdb and lock.mdb of that generation
      2/            the next one, while a compaction writes it

A generation never comes back: numbers only grow. When a generation is left, it says so in itself (`LmdbStore`), and
whoever has it open goes over to the next. So the pointer only has to lead to a generation that is still there, from
which the newest can be reached. Which methods need the lock of writers of the current generation is said below.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vista.errors import StoreError
from vista.files import sync, write_durably

POINTER = "CURRENT"
FIRST = 1
REMOVED = ".removed"  # suffix of a folder that is being removed: nobody opens, or makes a file in, what has no place


class Generations:
    """The generations of the store at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, number: int) -> Path:
        return self.path / str(number)

    def current(self) -> int | None:
        """The number in the pointer, None where there is no store yet. Raises StoreError for a damaged pointer."""
        try:
            text = (self.path / POINTER).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not text.strip().isdecimal():
            raise StoreError(
                f"{self.path / POINTER}: {text[:40]!r} is no number of a generation; write the number of the newest "
                "folder beside it there"
            )
        return int(text)

    def claim_first(self) -> None:
        """Point to the first generation, unless another process has made a pointer before."""
        partial = self.path / f"{POINTER}.{os.getpid()}.partial"
        partial.write_text(f"{FIRST}\n")
        sync(partial)
        try:
            os.link(partial, self.path / POINTER)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
        sync(self.path)

    def is_tidy(self, number: int) -> bool:
        """Whether the pointer is at a generation, and no other is there."""
        return self.current() == number and not self._others(number)

    def tidy(self, number: int) -> None:
        """Point to a generation and remove all others. For who holds the lock of writers of this generation."""
        if self.current() != number:
            write_durably(self.path / POINTER, f"{number}\n")
        self.remove_others(number)

    def remove_others(self, number: int) -> None:
        """For who holds the lock of writers of this generation: nobody else makes a newer one then."""
        for folder in self._others(number):
            if folder.suffix != REMOVED:
                folder = folder.replace(folder.with_suffix(REMOVED))
            shutil.rmtree(folder)
        sync(self.path)

    def _others(self, number: int) -> list[Path]:
        return [
            path for path in sorted(self.path.iterdir()) if path.stem.isdecimal() and path.suffix in ("", REMOVED)
            and path.name != str(number)
        ]  # fmt: skip
