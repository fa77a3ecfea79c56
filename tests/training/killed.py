"""Training, killed: ``python -m tests.training.killed DATA CONFIG RUN SECONDS ...``.

For each number of seconds, a child trains or goes on training, and is killed so long after a checkpoint of its own is
there; a last one is left to end. Prints how many were killed at work. All of it in one process, so that torch is
imported once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from vista.config import Config
from vista.data.histories import PreparedData
from vista.training.loop import train

POLL_S = 0.005


def in_child(data: str, config: str, run: Path, has_begun: bool) -> int:
    """Train in a child process; its id."""
    child = os.fork()
    if not child:
        try:
            settings = Config.from_json(Path(config).read_text())
            train(PreparedData.open(data), run, settings, resume=has_begun, quiet=True)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def main(data: str, config: str, run: Path, delays_s: list[float]) -> None:
    saved, num_killed = run / "training.safetensors", 0
    for delay_s in delays_s:
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        child, status = in_child(data, config, run, saved.exists()), (0, 0)
        while not (saved.exists() and saved.stat().st_mtime_ns > before) and not status[0]:
            time.sleep(POLL_S)
            status = os.waitpid(child, os.WNOHANG)
        if not status[0]:
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
        num_killed += os.WIFSIGNALED(status[1])
    assert os.waitpid(in_child(data, config, run, saved.exists()), 0)[1] == 0
    print(num_killed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [float(word) for word in sys.argv[4:]])
