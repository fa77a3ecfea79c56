"""HTTP connections that cannot be held for ever by who sends slowly, nor filled by who never ends a head, nor too many.

uvicorn bounds the time between two requests of a connection, and the handlers that of an answer; here is what is left:
the time in which a request must arrive, head and body, from its first byte or that of the connection, and the size of
its head, and how many connections are open. A body that comes too slowly has its 408 from the handler, long before.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vista.serving.logs import say

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
TOO_MANY_S = 1.0  # for a connection too many to send the first bytes of a request, to which it has its answer
FILES_KEPT = 256  # of those that a process may have open: for the store, gRPC, and connections too many
ANSWERS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def protocol(request_s: float, max_connections: int, turned_away: Callable[[], object]) -> type[asyncio.Protocol]:
    """The protocol of a connection for uvicorn.

    request_s: time in which a request must be there as a whole; turned_away: called for each connection too many.
    """

    class Bounded(BoundedProtocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.request_s, self.max_connections, self.turned_away = request_s, max_connections, turned_away

    return Bounded


def most_connections(wanted: int) -> int:
    """As many as are wanted, if this process may have so many files open: it allows itself all it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted + FILES_KEPT if hard == resource.RLIM_INFINITY else min(wanted + FILES_KEPT, hard)
    if soft != resource.RLIM_INFINITY and allowed > soft:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit of their own
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    most = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - FILES_KEPT, soft // 2))
    if most < wanted:
        say("warning", problem=f"only {most} connections instead of {wanted}: raise the limit of open files ({hard})")
    return most


class BoundedProtocol(HttpToolsProtocol):
    """A connection whose requests arrive in bounded time, with heads of bounded size."""

    request_s: float
    max_connections: int
    turned_away: Callable[[], object]
    _timer: asyncio.TimerHandle | None = None
    _is_in_head, _head_bytes = False, 0
    _is_too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_too_many = len(self.connections) > self.max_connections
        if self._is_too_many:
            self.turned_away()
            self.request_s = TOO_MANY_S
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_too_many:  # not before it has sent something: who is hung up on while sending reads no answer
            self._refuse(503, f"more than {self.max_connections} connections", "retry-after: 1\r\n")
            return
        self._watch()  # empty lines before a request are data, too, and begin none
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"headers of more than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        self._watch()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._unwatch()
        super().on_message_complete()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.request_s, self._too_slow)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._is_in_head:
            self._refuse(408, f"no whole request within {self.request_s:g} s")
        else:  # nothing was asked, or it has its answer
            self.transport.close()

    def _refuse(self, status: int, problem: str, header: str = "") -> None:
        """End the connection with an answer. There is no request yet that could have one."""
        if not self.transport.is_closing():
            say("refused", status=status, problem=problem)
            head = f"HTTP/1.1 {status} {ANSWERS[status]}\r\nconnection: close\r\ncontent-length: 0\r\n{header}\r\n"
            self.transport.write(head.encode())
            self.transport.close()
