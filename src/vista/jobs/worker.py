"""A worker of the local engine: ``python -m vista.jobs.worker FD``, started and ended by `vista.jobs.local`.

It takes a ``FoldTask``, answers READY (or with the VistaError that kept it from that), then takes blocks and answers
with what became of each. It ends as soon as the other end of the connection is gone, in the middle of a block too.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from vista.errors import VistaError

READY = "ready"


def main() -> None:
    connection = Connection(int(sys.argv[-1]))
    received: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(connection, received), daemon=True).start()
    torch.set_num_threads(1)
    task = received.get()
    try:
        fold = task.open()
    except VistaError as error:
        connection.send(error)
        return
    try:
        connection.send(READY)
        while True:
            connection.send(fold(received.get()))
    except ConnectionError:
        return  # the thread has not been fast enough


def _receive(connection: Connection, received: SimpleQueue[Any]) -> None:
    """In a thread, so that the end of the other process is seen at once."""
    while True:
        try:
            received.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
