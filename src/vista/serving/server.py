"""The server as a process: both protocols on one event loop, from start to drained end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import torch
import uvicorn

from vista.errors import ConfigError
from vista.serving.connections import most_connections, protocol
from vista.serving.grpc_server import GrpcServer
from vista.serving.history import HistorySource
from vista.serving.http import application
from vista.serving.logs import say
from vista.serving.metrics import Metrics
from vista.serving.options import ServeOptions
from vista.serving.service import LOOK_TIMEOUT_S, Service
from vista.store.contract import open_store, shown

BACKLOG = 2048
KEEP_ALIVE_S = 75  # of an idle connection: longer than clients and proxies keep theirs, or they meet a closed one
ARRIVAL_SHARE = 1.5  # of the longest deadline: until then a request must be there, after it none has an answer
POLL_S = 0.01


def serve(options: ServeOptions, histories: HistorySource | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises VistaError where it cannot start.

    histories: prepared data, where the page is to show whole histories.
    """
    token = options.token()
    check_certificate(options)
    if not options.is_loopback and token is None:
        say("warning", problem=f"others can reach {options.host}, and without --token-file anybody may ask")
    torch.set_num_threads(options.threads)
    open_store(options.store, read_only=True).close()  # a mistyped path must not become an empty store
    with open_store(options.store) as store, bound(options) as listening:
        service = Service(options, store, Metrics(), histories)
        try:
            # Not uvloop: it accepts one connection per turn of the loop, and under too much load clients that open new
            # ones wait for many seconds (bench/serve.py).
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                runner.run(Server(options, service, token).run(listening, has_signals=True))
        finally:
            service.close()
    say("ended")


@contextlib.contextmanager
def bound(options: ServeOptions) -> Iterator[socket.socket]:
    """A socket on the HTTP port. Raises ConfigError where that cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only on sockets that say they are TCP; else they wait some 40 ms
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((options.host, options.http_port))
        except OSError as error:
            raise ConfigError(
                f"port {options.http_port} of {options.host} cannot be had ({error}); choose another with --http-port"
            ) from error
        yield listening


def check_certificate(options: ServeOptions) -> None:
    """Raise ConfigError for files that are no certificate and its key."""
    if options.tls_cert is None or options.tls_key is None:
        return
    try:
        ssl.create_default_context().load_cert_chain(str(options.tls_cert), str(options.tls_key))
    except OSError as error:  # ssl's own errors are among these
        raise ConfigError(f"{options.tls_cert}, {options.tls_key}: no certificate and its key ({error})") from error


class _Http(uvicorn.Server):
    """Signals are ours: the end has steps."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One run of the server."""

    def __init__(self, options: ServeOptions, service: Service, token: bytes | None) -> None:
        self._options, self._service, self._token = options, service, token
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin the end. To be called in the event loop."""
        self._stop.set()

    async def run(
        self, listening: socket.socket, has_signals: bool = False, started: Callable[[int], object] = lambda port: None
    ) -> None:
        """Serve until stopped. started: called with the port of gRPC when both protocols answer."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if has_signals else ():
            loop.add_signal_handler(number, self.stop)
        http = _Http(self._http_config())
        grpc = GrpcServer(self._options, self._service, self._token)
        grpc_port = await grpc.start()
        serving = asyncio.create_task(http.serve([listening]))
        stopping = asyncio.create_task(self._stop.wait())
        while not http.started and not serving.done():
            await asyncio.sleep(POLL_S)
        url = self._url(listening.getsockname()[1])
        say(
            "serving", http=url, page=f"{url}/ui" if self._options.has_page else None,
            grpc=f"{self._options.host}:{grpc_port}", store=shown(self._options.store),
            version=self._service.model.version,
        )  # fmt: skip
        started(grpc_port)
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        await self._drain(http, grpc, serving)

    async def _drain(self, http: uvicorn.Server, grpc: GrpcServer, serving: asyncio.Task[None]) -> None:
        """No longer ready, then no new connections, then the end of what is in flight, for a bounded time."""
        self._service.is_draining = True
        say("draining", delay_s=self._options.drain_delay_s, limit_s=self._service.limits.drain_s)
        await asyncio.sleep(self._options.drain_delay_s)
        http.should_exit = True
        await asyncio.gather(grpc.stop(self._service.limits.drain_s), serving)

    def _http_config(self) -> uvicorn.Config:
        options = self._options
        request_s = ARRIVAL_SHARE * max(options.limits.timeout_s, LOOK_TIMEOUT_S)
        most = most_connections(options.limits.max_connections)
        return uvicorn.Config(
            application(self._service, self._token), log_config=None, access_log=False, lifespan="off", ws="none",
            http=protocol(request_s, most, self._service.metrics.turned_away.inc),
            server_header=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(int(options.limits.drain_s), 1),
            ssl_certfile=options.tls_cert, ssl_keyfile=options.tls_key,
        )  # fmt: skip

    def _url(self, port: int) -> str:
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"{'https' if self._options.tls_cert else 'http'}://{host}:{port}"
