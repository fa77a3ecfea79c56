"""Around every HTTP request: an id, the token, a line in the log, counts and times."""

from __future__ import annotations

import hmac
import json
import re
import time
import traceback
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vista.errors import RecordError, RequestError, VistaError
from vista.serving.logs import say
from vista.serving.metrics import Metrics

OPEN_PATHS = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")  # a prober has no token
OPEN_FILES = ("/ui", "/openapi.json")  # nor has a browser that has not asked for it yet; these tell of nobody
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
FACTS = "vista.facts"  # in a scope: what the log and the metrics are to know of a request
CLIENT_GONE = 499  # in log and metrics alone: nobody is left to be told


class Surroundings:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, token: bytes | None) -> None:
        self._app, self._metrics, self._token = app, metrics, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.monotonic(), CLIENT_GONE
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"endpoint": "other", "stages": {}, "request_id": request_id}
        scope[FACTS] = facts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._token is not None and not is_open(scope["path"]):
                check_token(headers.get(b"authorization", b""), self._token)
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            pass
        except RequestError as error:  # of the token; what a handler raises, it answers
            _, facts["problem"], extra = told(error)
            await _send_json(answer, error.status, {"error": str(error), "request_id": request_id}, extra)
        finally:
            self._observe(scope, facts, status, time.monotonic() - began_s)

    def _observe(self, scope: Scope, facts: dict[str, Any], status: int, total_s: float) -> None:
        endpoint, stages = facts.pop("endpoint"), facts.pop("stages") | {"total": total_s}
        self._metrics.requests.labels(endpoint, str(status)).inc()
        for stage, seconds in stages.items():
            self._metrics.stage.labels(endpoint, stage).observe(seconds)
        times = {f"{name}_ms": round(seconds * 1000, 3) for name, seconds in stages.items()}
        say(
            "request", method=scope["method"], path=scope["path"][:200], endpoint=endpoint, status=status, **times,
            **facts,
        )  # fmt: skip


def is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return path in OPEN_PATHS or path in OPEN_FILES or path.startswith("/ui/")


def check_token(authorization: bytes, token: bytes) -> None:
    """Raise RequestError unless a header is ``Bearer`` and the token."""
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token):
        raise RequestError("the header 'Authorization: Bearer TOKEN' is missing or wrong", 401)


def told(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers for an error. What is no mistake of the request is not told, but logged."""
    if isinstance(error, RequestError):
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        return error.status, str(error), headers | ({"www-authenticate": "Bearer"} if error.status == 401 else {})
    if isinstance(error, RecordError):
        return 500, str(error), {}
    if isinstance(error, VistaError):
        return 503, str(error), {"retry-after": "1"}
    say("error", traceback=traceback.format_exception(error))
    return 500, "an error in the server; its log has the trace under this request's id", {}


async def _send_json(send: Send, status: int, content: Any, headers: dict[str, str]) -> None:
    body = json.dumps(content).encode()
    named = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
