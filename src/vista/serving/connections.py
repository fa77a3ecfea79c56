"""HTTP connections that cannot be held for ever by who sends slowly, nor filled by who never ends a head.

uvicorn bounds the time between two requests of a connection, and the handlers that of an answer; here is what is left:
the time in which a request must arrive, head and body, from its first byte or that of the connection, and the size of
its head. A body that comes too slowly has its 408 from the handler, long before.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vista.serving.logs import say

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
ANSWERS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


def protocol(request_s: float) -> type[asyncio.Protocol]:
    """The protocol of a connection for uvicorn. request_s: time in which a request must be there as a whole."""

    class Bounded(BoundedProtocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.request_s = request_s

    return Bounded


class BoundedProtocol(HttpToolsProtocol):
    """A connection whose requests arrive in bounded time, with heads of bounded size."""

    request_s: float
    _timer: asyncio.TimerHandle | None = None
    _is_in_head, _head_bytes = False, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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

    def _refuse(self, status: int, problem: str) -> None:
        """End the connection with an answer. There is no request yet that could have one."""
        if not self.transport.is_closing():
            say("refused", status=status, problem=problem)
            head = f"HTTP/1.1 {status} {ANSWERS[status]}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()
