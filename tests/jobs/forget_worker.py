"""`vista forget`, killed: ``python -m tests.jobs.forget_worker FOLDER PLACE NUMBER ...``.

FOLDER holds data, store and runs (``job_in``). For each number, FOLDER is copied to PLACE/NUMBER, and a child forgets
there until just before its step of that number, where it is killed. A step is whatever changes a file or waits for the
disk. Without numbers, the steps of a whole run are printed. All of it in one process, so that torch is imported once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vista.data.forget import Selection
from vista.store.lmdb_store import LmdbStore

SELECTION = Selection((103, 107), item=5)
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")  # audit events, before they happen
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def job_in(folder: Path) -> Any:
    """Forget in a folder made by the test; its report."""
    from vista.checkpoint import load_run
    from vista.jobs.forget import forget

    runs = [load_run(path) for path in sorted(folder.glob("run*"))]
    return forget(folder / "data", str(folder / "store"), SELECTION, runs, quiet=True)


def watch(folder: Path, reached: Callable[[str], None]) -> None:
    """Call ``reached`` before every step in a folder. It cannot be undone: only for a process that ends."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        is_step = event in STEPS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if is_step and str(arguments[0]).startswith(str(folder)):
            reached(f"{event} {Path(str(arguments[0])).relative_to(folder)}")

    fsync, attempt = os.fsync, LmdbStore._attempt

    def watched_fsync(descriptor: int) -> None:
        reached("fsync")
        fsync(descriptor)

    def watched_attempt(store: LmdbStore, action: Any) -> Any:
        reached("transaction")
        result = attempt(store, action)
        reached("after transaction")
        return result

    sys.addaudithook(audit)
    os.fsync = watched_fsync
    LmdbStore._attempt = watched_attempt  # type: ignore[method-assign]


def in_child(folder: Path, reached: Callable[[str], None]) -> int:
    """Forget in a child process; its wait status."""
    child = os.fork()
    if not child:
        try:
            watch(folder, reached)
            job_in(folder)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_at(number: int) -> Callable[[str], None]:
    left = [number]

    def reached(step: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def main(origin: Path, place: Path, numbers: list[int]) -> None:
    import vista.api  # noqa: F401 (before the forks)

    if not numbers:
        shutil.copytree(origin, place / "whole")
        status = in_child(place / "whole", lambda step: print(step, flush=True))
        assert status == 0, status
    for number in numbers:
        shutil.copytree(origin, place / str(number))
        status = in_child(place / str(number), kill_at(number))
        print(number, "killed" if os.WIFSIGNALED(status) else f"ended with {status}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
