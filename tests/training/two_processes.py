"""What each process of tests/training/test_processes.py does: python -m tests.training.two_processes FOLDER."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from tests.training.worlds import SMALL
from vista.config import Config, resolve
from vista.data.histories import PreparedData
from vista.training import loop, sharded
from vista.training.loop import train

STOP = 4  # steps; inside an epoch, with lanes under way
STEPS = {"train.max_steps": 10, "train.checkpoint_every_s": 1e9}


def config(model: str = "vista") -> Config:
    return resolve("tiny", overrides=SMALL | STEPS | {"model.model": model})


@contextlib.contextmanager
def interrupted(rank: str):
    """Ctrl-C after STOP steps, in one process alone."""
    step_by_step = loop.Trainer.train_step

    def interrupt(self, step):
        step_by_step(self, step)
        if self.position.step == STOP and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGINT)

    loop.Trainer.train_step = interrupt
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        loop.Trainer.train_step = step_by_step


def main() -> None:
    sharded.ROWS_AT_ONCE = 10  # several parts
    folder = Path(sys.argv[1])
    data = PreparedData.open(folder / "data")
    train(data, folder / "two", config(), quiet=True)
    with interrupted("1"):
        train(data, folder / "cut by two", config(), quiet=True)
    train(data, folder / "cut by one", config(), resume=True, quiet=True, shard_items=True)
    train(data, folder / "sharded", config(), quiet=True, shard_items=True)


if __name__ == "__main__":
    main()
