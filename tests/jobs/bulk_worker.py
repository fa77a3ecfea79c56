"""Workers of the local engine that misbehave, and the command line with such workers.

python -m tests.jobs.bulk_worker die-once FILE USER FD     killed at its first block with that user, unless FILE is
python -m tests.jobs.bulk_worker die USER FD               killed at every block with that user
python -m tests.jobs.bulk_worker slow FD                   takes a while for each block
python -m tests.jobs.bulk_worker never FD                  ends before it is ready
python -m tests.jobs.bulk_worker vista summarize ...       small blocks and slow workers
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vista.jobs import blocks, fold, local, worker

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

        local.WORKER, blocks.USERS_AT_ONCE = (*ME, "slow"), USERS_AT_ONCE
        del sys.argv[1]
        vista()
    elif mode == "never":
        sys.exit(7)
    else:
        worker.main()


if __name__ == "__main__":
    main()
