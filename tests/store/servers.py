"""Real Redis or Valkey servers for tests: on a free port of this machine, with a folder of their own."""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
DURABLE = {"appendonly": "yes", "appendfsync": "always"}
START_S = 20  # at most, until a server answers


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Server:
    """One server; ``start`` after ``kill`` finds what was on disk."""

    def __init__(self, folder: Path, **settings: str) -> None:
        if PROGRAM is None:
            pytest.skip("needs a server: install the Debian package valkey-server or redis-server")
        pytest.importorskip("redis", reason="needs the extra: pip install 'vista-recsys[redis]'")
        self.folder, self.port, self.socket = folder, free_port(), folder / "socket"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._settings = {"save": "", **DURABLE, **{name.replace("_", "-"): value for name, value in settings.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self, max_file_bytes: int = resource.RLIM_INFINITY) -> None:
        """max_file_bytes: a limit on the size of files stands for a full disk."""
        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder),
                    "unixsocket": str(self.socket), "logfile": "log", **self._settings}  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        self._process = subprocess.Popen(  # signals as Python has them: the limit is an error of write, not a signal
            [str(PROGRAM), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            restore_signals=False, preexec_fn=limit,
        )  # fmt: skip
        end_s = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"no server: {(self.folder / 'log').read_text()}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        import redis

        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:  # not there yet, or still reading its files
            return False

    def client(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
