"""The server and its store as processes, and loads on the server from this one."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, socket

STARTED_S = 60.0  # at most
REDIS = shutil.which("valkey-server") or shutil.which("redis-server")


class Server:
    """A process ``vista serve``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def processor_s(self) -> float:
        """Of all its threads so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@contextmanager
def serving(run: Path, url: str, folder: Path, *options: str) -> Iterator[Server]:
    """The server, until the end of the block; it must still be there then, and must end when it is told to."""
    folder.mkdir(exist_ok=True)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "vista.cli.main", "serve", "--run", str(run), "--store", url, "--http-port", "0",
               "--grpc-port", "0", *options]  # fmt: skip
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end_s = time.monotonic() + STARTED_S
        while b'"event": "serving"' not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"the server does not start: {log.read_text()}")
            time.sleep(0.05)
        port = int(re.findall(r'"http": "http://127.0.0.1:(\d+)"', log.read_text())[0])
        yield Server(process, port, log)
        if process.poll() is not None:
            raise SystemExit(f"the server ended by itself: {log.read_text()[-2000:]}")
        process.terminate()
        if process.wait(STARTED_S):
            raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Answer:
    """due_s: of the request, since the load began; took_s: from then to the answer; status: 0 where there was none."""

    due_s: float
    took_s: float
    late_s: float  # sent so long after it was due
    status: int
    is_degraded: bool


class Client:
    """Posts rankings over HTTP/1.1, on as many open connections as there are requests at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError or EOFError where there is none."""
        reader, writer = await self._connection()
        try:
            head = f"POST /v1/rank HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            size = int(re.findall(rb"(?i)content-length: (\d+)", answer)[0])
            content = await reader.readexactly(size)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(answer.split(b" ", 2)[1]), content

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that is idle, unless the server has closed it meanwhile, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def answer(self, body: bytes, began_s: float, due_s: float) -> Answer:
        late_s = time.perf_counter() - began_s - due_s
        try:
            status, content = await self.post(body)
        except (OSError, EOFError):
            status, content = 0, b""
        took_s = time.perf_counter() - began_s - due_s
        return Answer(due_s, took_s, late_s, status, b'"is_degraded": true' in content)


async def closed_loop(port: int, asks: Sequence[bytes], connections: int, count: int) -> tuple[list[float], float]:
    """``count`` requests, each connection's next one when it has its answer: seconds of each, and of all together."""
    client, took_s, numbers = Client(port), [], iter(range(count))
    began_s = time.perf_counter()

    async def ask() -> None:
        for number in numbers:
            start_s = time.perf_counter()
            status, content = await client.post(asks[number % len(asks)])
            took_s.append(time.perf_counter() - start_s)
            if status != 200:
                raise SystemExit(f"status {status}: {content.decode()}")

    await asyncio.gather(*(ask() for _ in range(connections)))
    client.close()
    return took_s, time.perf_counter() - began_s


async def open_loop(port: int, asks: Sequence[bytes], rate: float, seconds: float) -> list[Answer]:
    """Requests at random times, ``rate`` a second, whether or not those before have been answered."""
    rng, client = random.Random(0), Client(port)
    began_s, due_s, tasks = time.perf_counter(), 0.0, []
    while (due_s := due_s + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(began_s + due_s - time.perf_counter(), 0))
        body = asks[len(tasks) % len(asks)]
        tasks.append(asyncio.create_task(client.answer(body, began_s, due_s)))
    answers = await asyncio.gather(*tasks)
    client.close()
    return list(answers)


class Redis:
    """A server of our own, that keeps what it has on disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.socket = folder, folder / "socket"
        self.url = f"unix:{self.socket}?socket_timeout=1"
        self.start()
        while not self._answers():
            time.sleep(0.01)

    def start(self) -> None:
        words = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.folder),
                 "--appendonly", "yes", "--appendfsync", "always"]  # fmt: skip
        self._process = subprocess.Popen([str(REDIS), *words], stdout=subprocess.DEVNULL)

    def _answers(self) -> bool:
        with socket(AF_UNIX) as connection:
            return connection.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)
