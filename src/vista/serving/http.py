"""The HTTP endpoints: how a request gets to its answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version as version_of
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vista.errors import RequestError
from vista.serving import answers, looks
from vista.serving.inference import HEADER_LENGTH, InferRequest, infer_answer
from vista.serving.middleware import FACTS, Surroundings, told
from vista.serving.openapi import openapi_document
from vista.serving.page import page_file
from vista.serving.requests import (
    LARGEST_INTEGER,
    MAX_EVENTS_OF_TOKEN,
    MAX_EVENTS_SHOWN,
    MAX_USERS_LISTED,
    TIMEOUT_HEADER,
    check_parameters,
    events_ask,
    explain_ask,
    rank_ask,
    read_id,
    read_number,
    recommend_ask,
    shown,
)
from vista.serving.service import LOOK_TIMEOUT_S, Service
from vista.serving.tensors import MODEL_NAME, answer_tensors, inputs_of, outputs_of, queries_of

Handler = Callable[[Request], Awaitable[Response]]


class _Anything(Convertor[str]):
    """The rest of a path as it is: Starlette's own ``path`` ends at a line break, so ``a%0A`` would be user ``a``."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


def application(service: Service, token: bytes | None) -> ASGIApp:
    """The ASGI application of a service."""
    app = Starlette(
        routes=Handlers(service, token is not None).routes(), exception_handlers={HTTPException: _not_routed}
    )
    return Surroundings(app, service.metrics, token)


class Handlers:
    """One method per endpoint."""

    def __init__(self, service: Service, has_token: bool = False) -> None:
        """has_token: whether requests must carry one, as the description says."""
        self._service, self._has_token = service, has_token

    def routes(self) -> list[Route]:
        post, get = ["POST"], ["GET"]
        model = f"/v2/models/{MODEL_NAME}"
        table: list[tuple[str, str, list[str], Handler]] = [
            ("/v1/rank", "rank", post, self.rank),
            ("/v1/recommend", "recommend", post, self.recommend),
            ("/v1/events", "events", post, self.events),
            ("/v1/explain", "explain", post, self.explain),
            ("/v1/users", "users", get, self.some_users),
            ("/v1/users/{id:anything}", "users", get, self.user),
            ("/v1/history/{id:anything}", "history", get, self.history),
            ("/v1/tokens/{id:anything}", "tokens", get, self.tokens),
            ("/v1/status", "status", get, self.status),
            ("/openapi.json", "metadata", get, self.openapi),
            ("/livez", "health", get, self.live),
            ("/readyz", "health", get, self.ready),
            ("/metrics", "metrics", get, self.metrics),
            ("/v2/health/live", "health", get, self.live),
            ("/v2/health/ready", "health", get, self.ready),
            ("/v2", "metadata", get, self.server_metadata),
            (model, "metadata", get, self.model_metadata),
            (f"{model}/ready", "health", get, self.ready),
            (f"{model}/infer", "infer", post, self.infer),
            (f"{model}/versions/{{version}}", "metadata", get, self.model_metadata),
            (f"{model}/versions/{{version}}/ready", "health", get, self.ready),
            (f"{model}/versions/{{version}}/infer", "infer", post, self.infer),
        ]
        if self._service.options.has_page:
            table += [("/ui", "page", get, self.page), ("/ui/{name}", "page", get, self.page)]
        return [Route(path, _named(endpoint, handler), methods=methods) for path, endpoint, methods, handler in table]

    # -- for people

    async def rank(self, request: Request) -> Response:
        deadline_s = self._deadline_s(request)
        self._service.check_room(deadline_s)
        ask = rank_ask(await self._body(request, deadline_s), self._service.limits)
        found = await self._service.rank(ask, deadline_s)
        _facts(request).update(
            stages=found.stages, num_candidates=len(ask.candidates), model_version=found.model.version,
            is_known_user=found.ranking.is_known_user,
        )  # fmt: skip
        return json_response(answers.ranked(found, ask))

    async def recommend(self, request: Request) -> Response:
        deadline_s = self._deadline_s(request)
        ask = recommend_ask(await self._body(request, deadline_s), self._service.limits)
        found = await self._service.recommend(ask, deadline_s)
        _facts(request).update(num_scored=found.num_scored, model_version=found.model.version)
        return json_response(answers.recommended(found, ask))

    async def events(self, request: Request) -> Response:
        deadline_s = self._deadline_s(request)
        events = events_ask(await self._body(request, deadline_s), self._service.limits)
        found = await self._service.post(events, deadline_s)
        _facts(request).update(num_events=len(events), model_version=found.version)
        return json_response(answers.posted(found))

    async def user(self, request: Request) -> Response:
        user = read_id(request.path_params["id"], "user")
        model, stored = await self._service.user(user, self._deadline_s(request))
        return json_response(answers.user(model, stored, user))

    # -- for those who look closer

    async def explain(self, request: Request) -> Response:
        deadline_s = self._deadline_s(request, most_s=LOOK_TIMEOUT_S)
        ask = explain_ask(await self._body(request, deadline_s), self._service.limits)
        found = await self._service.explain(ask, deadline_s)
        _facts(request).update(num_candidates=len(ask.candidates), model_version=found.model.version)
        return json_response(looks.explained(found, ask))

    async def some_users(self, request: Request) -> Response:
        check_parameters(request.query_params.multi_items(), ("limit",))
        limit = read_number(request.query_params, "limit", 20, MAX_USERS_LISTED)
        return json_response(
            looks.some_users(*await self._service.some_users(limit, self._deadline_s(request, most_s=LOOK_TIMEOUT_S)))
        )

    async def history(self, request: Request) -> Response:
        given = request.query_params
        check_parameters(given.multi_items(), ("limit", "before"))
        limit = read_number(given, "limit", 100, MAX_EVENTS_SHOWN)
        before = read_number(given, "before", LARGEST_INTEGER, LARGEST_INTEGER)
        user = read_id(request.path_params["id"], "user")
        model, known = await self._service.history(user, self._deadline_s(request, most_s=LOOK_TIMEOUT_S))
        return json_response(looks.history(model, known, user, limit, before))

    async def tokens(self, request: Request) -> Response:
        check_parameters(request.query_params.multi_items(), ("events",))
        number = read_number(request.query_params, "events", 5, MAX_EVENTS_OF_TOKEN)
        user = read_id(request.path_params["id"], "user")
        return json_response(
            looks.tokens(
                await self._service.traced(user, self._deadline_s(request, most_s=LOOK_TIMEOUT_S)), user, number
            )
        )

    async def status(self, request: Request) -> Response:
        found = await self._service.versions(self._deadline_s(request, most_s=LOOK_TIMEOUT_S))
        return json_response(looks.status(self._service, *found))

    async def openapi(self, request: Request) -> Response:
        return json_response(openapi_document(self._has_token, self._service.options.has_page))

    async def page(self, request: Request) -> Response:
        return page_file(request.path_params.get("name", "index.html"), request.headers.get("if-none-match", ""))

    # -- for machines

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """200, or 503 and why not."""
        self._check_version(request)
        problem = self._service.why_not_ready()
        content = {"ready": not problem, "model_version": self._service.model.version}
        return json_response(content | ({"problem": problem} if problem else {}), 503 if problem else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def server_metadata(self, request: Request) -> Response:
        return json_response(server_metadata())

    async def model_metadata(self, request: Request) -> Response:
        self._check_version(request)
        return json_response(model_metadata(self._service))

    async def infer(self, request: Request) -> Response:
        self._check_version(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError("compressed bodies are not read; send it as it is", 415)
        deadline_s = self._deadline_s(request)
        self._service.check_room(deadline_s)
        body = await self._body(request, deadline_s)
        asked = InferRequest(body, request.headers.get(HEADER_LENGTH), self._service.limits)
        model = self._service.model
        queries, is_batch = queries_of(model, asked.tensors, self._service.limits)
        found = await self._service.rank_many(queries, min(deadline_s, self._service.deadline_s(asked.timeout_s)))
        _facts(request).update(stages=found[0].stages, num_users=len(found), model_version=model.version)
        content, headers = infer_answer(asked, model.version, answer_tensors(found, is_batch, asked.outputs))
        return Response(content, headers=headers)

    # -- common

    def _check_version(self, request: Request) -> None:
        check_version(self._service, request.path_params.get("version", ""))

    def _deadline_s(self, request: Request, most_s: float | None = None) -> float:
        """The sooner of what the header says and the limit, from now on. Raises RequestError."""
        text, timeout_s = request.headers.get(TIMEOUT_HEADER), None
        if text is not None:
            if not (text.isascii() and text.isdecimal() and len(text) <= 12 and int(text)):
                raise RequestError(f"{TIMEOUT_HEADER} is {shown(text)}; give milliseconds, an integer above 0")
            timeout_s = int(text) / 1000
        return self._service.deadline_s(timeout_s, most_s)

    async def _body(self, request: Request, deadline_s: float) -> bytes:
        """The body, unless it is too large, then it is not even read to its end, or comes too slowly.

        Raises RequestError.
        """
        most, size = self._service.limits.max_body_bytes, 0
        parts = []
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise RequestError(
                            f"a body of {size} bytes or more; the most is {most}: send several requests", 413
                        )
                    parts.append(part)
        except TimeoutError:
            raise RequestError(
                f"the deadline passed with {size} bytes of the body there; send it faster", 408
            ) from None
        return b"".join(parts)


def check_version(service: Service, version: str) -> None:
    """Raise RequestError where a request names another version than the one that answers."""
    if version not in ("", service.model.version):
        raise RequestError(f"version {shown(version)} is not served; version {service.model.version} is", 404)


def server_metadata() -> dict[str, Any]:
    return {"name": "vista", "version": version_of("vista-recsys"), "extensions": ["binary_tensor_data"]}


def model_metadata(service: Service) -> dict[str, Any]:
    model = service.model
    return {
        "name": MODEL_NAME,
        "versions": [model.version],
        "platform": "vista",
        "inputs": inputs_of(model),
        "outputs": outputs_of(model),
    }


def json_response(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


def _facts(request: Request) -> dict[str, Any]:
    facts: dict[str, Any] = request.scope[FACTS]
    return facts


def _named(endpoint: str, handler: Handler) -> Handler:
    """A handler that says first what it is, and answers errors, too."""

    async def handle(request: Request) -> Response:
        facts = _facts(request)
        facts["endpoint"] = endpoint
        try:
            return await handler(request)
        except ClientDisconnect:
            raise
        except Exception as error:
            status, facts["problem"], headers = told(error)
            if status == 408:  # what is left of the body would keep the connection busy
                headers["connection"] = "close"
            response = json_response({"error": facts["problem"], "request_id": facts["request_id"]}, status)
            response.headers.update(headers)
            return response

    return handle


async def _not_routed(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = json_response({"error": message, "request_id": _facts(request)["request_id"]}, error.status_code)
    response.headers.update(error.headers or {})
    return response
