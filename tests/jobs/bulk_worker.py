"""Workers of the local engine that misbehave, and the command line with such workers.

python -m tests.jobs.bulk_worker die-once FILE USER FD     killed at its first block with that user, unless FILE is
python -m tests.jobs.bulk_worker die USER FD               killed at every block with that user
python -m tests.jobs.bulk_worker slow FD                   takes a while for each block
python -m tests.jobs.bulk_worker never FD                  ends before it is ready
python -m tests.jobs.bulk_worker vista summarize ...       small blocks and slow workers
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vista.jobs import blocks, fold, local, on_ray, worker

ME = (sys.executable, "-m", "tests.jobs.bulk_worker")
SLOW_S = 0.2  # per block
USERS_AT_ONCE = 2


def main() -> None:
    mode, *words = sys.argv[1:]
    summarize_users = fold.summarize_users

    def misbehave(model: Any, histories: Any, users: Any, *others: Any) -> Any:
        if mode == "slow":
            time.sleep(SLOW_S)
        elif int(words[-2]) in users and not (mode == "die-once" and Path(words[0]).exists()):
            Path(words[0]).touch() if mode == "die-once" else None
            os.kill(os.getpid(), signal.SIGKILL)
        return summarize_users(model, histories, users, *others)

    fold.summarize_users = misbehave
    if mode == "vista":
        from vista.cli.main import main as vista

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        local.WORKER, blocks.USERS_AT_ONCE = (*ME, "slow"), USERS_AT_ONCE
        del sys.argv[1]
        vista()
    elif mode == "never":
        sys.exit(7)
    else:
        worker.main()


class DyingFolder(on_ray.Folder):
    """A Ray actor that is killed at every block with user 12; only at the first if VISTA_TEST_DIED names a file."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        marker = Path(os.environ.get("VISTA_TEST_DIED", os.devnull))
        has_died = marker.is_file()  # which the null device is not
        if not has_died and any(12 in pickle.loads(block).users for block in batch["block"]):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


if __name__ == "__main__":
    main()
