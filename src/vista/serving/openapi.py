"""The description of the HTTP interface, OpenAPI 3.1, served at ``/openapi.json``: paths, parameters, responses.

Written by hand; the tests hold every route and real answers to it, and the slow ones whatever a fuzzer makes of it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version as version_of

from vista.serving.bodies import ANYTHING, COUNT, TEXT, Schema, part, schemas
from vista.serving.inference import HEADER_LENGTH
from vista.serving.page import KINDS
from vista.serving.requests import (
    LARGEST_INTEGER,
    LONGEST_ID_BYTES,
    MAX_EVENTS_OF_TOKEN,
    MAX_EVENTS_SHOWN,
    MAX_USERS_LISTED,
    TIMEOUT_HEADER,
)

PROBLEMS = {
    400: "The request is wrong.",
    401: "The token is missing or wrong.",
    404: "What the path names is not there.",
    408: "The deadline passed before the body was there.",
    413: "More in one request than this server takes.",
    415: "The body is compressed.",
    429: "Too many wait, or an answer would come too late.",
    500: "A damaged record, or an error of the server.",
    501: "The store or the model cannot do it.",
    503: "The store is away.",
    504: "The deadline passed before there was an answer.",
}
HAS_RETRY = (429, 503)
WORK = (400, 429, 500, 503, 504)  # of all that is not answered out of the process's own memory
BODY = (408, 413)
BINARY: Schema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def _said_by(*codes: int) -> dict[str, Schema]:
    """The responses of some problems, by status."""
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in codes}


def _problem(code: int) -> Schema:
    """The response of a problem."""
    found = _json(part("Error"), PROBLEMS[code])
    if code in HAS_RETRY:
        found["headers"] = {"retry-after": {"schema": COUNT, "description": "Seconds after which to ask again."}}
    return found


def _json(schema: Schema, description: str = "The answer.") -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(
    summary: str, answer: Schema, body: str = "", parameters: tuple[Schema, ...] = (), problems: tuple[int, ...] = WORK
) -> Schema:
    found: Schema = {"summary": summary, "responses": {"200": answer}}
    if body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": part(body)}}}
        problems += BODY
    found["responses"] |= _said_by(*sorted(problems))
    timeout = (
        _in("header", TIMEOUT_HEADER, _count(1, 10**12 - 1), "Time for an answer, where less than the server's."),
    )
    return found | {"parameters": [*parameters, *(timeout if WORK[-1] in problems else ())]}


def _open(summary: str, answer: Schema, parameters: tuple[Schema, ...] = (), problems: tuple[int, ...] = ()) -> Schema:
    """An operation that needs no token."""
    return _operation(summary, answer, "", parameters, problems) | {"security": []}


def _in(place: str, name: str, schema: Schema, description: str) -> Schema:
    """A parameter. place: path, query or header."""
    found = {"name": name, "in": place, "schema": schema, "description": description}
    return found | ({"required": True} if place == "path" else {})


def _count(least: int, most: int) -> Schema:
    return COUNT | {"minimum": least, "maximum": most}


def _number(name: str, most: int, description: str) -> Schema:
    return _in("query", name, _count(0, most), description)


def _paths_v1() -> Schema:
    user = _in("path", "id", TEXT | {"minLength": 1, "maxLength": LONGEST_ID_BYTES}, "A user.")
    of_user = (*WORK, 404)
    before = _number("before", LARGEST_INTEGER, "A place; events before it.")
    return {
        "/v1/rank": {"post": _operation("Rank given candidates", _json(part("Ranked")), "Ranking")},
        "/v1/recommend": {"post": _operation("The best items of all", _json(part("Recommended")), "Recommend")},
        "/v1/events": {
            "post": _operation(
                "New events, durable when answered", _json(part("Posted")), "Events", problems=(*WORK, 501)
            )
        },
        "/v1/explain": {"post": _operation("Rank, and say why", _json(part("Explained")), "Explain")},
        "/v1/users": {
            "get": _operation(
                "Some users of the store", _json(part("Users")),
                parameters=(_number("limit", MAX_USERS_LISTED, "How many at most."),),
            )
        },
        "/v1/users/{id}": {
            "get": _operation("What the store has of a user", _json(part("User")), "", (user,), of_user)
        },
        "/v1/history/{id}": {
            "get": _operation(
                "A user's events", _json(part("History")), "",
                (user, _number("limit", MAX_EVENTS_SHOWN, "How many at most."), before), of_user,
            )
        },
        "/v1/tokens/{id}": {
            "get": _operation(
                "Which events wrote a user's summary tokens", _json(part("Tokens")), "",
                (user, _number("events", MAX_EVENTS_OF_TOKEN, "How many of each token at most.")), of_user,
            )
        },
        "/v1/status": {"get": _operation("Model, store and state of the server", _json(part("Status")))},
    }  # fmt: skip


def _paths_of_machines() -> Schema:
    alive = _open("Is the process alive", _json(part("Alive")))
    text: Schema = {"description": "Prometheus's text format.", "content": {"text/plain": {"schema": TEXT}}}
    return {
        "/livez": {"get": alive},
        "/readyz": {"get": _ready()},
        "/metrics": {"get": _operation("Counts and times", text, problems=())},
        "/openapi.json": {"get": _open("This description", _json(ANYTHING))},
        "/v2": {"get": _operation("Open Inference Protocol: the server", _json(part("ServerMetadata")), problems=())},
        "/v2/health/live": {"get": alive},
        "/v2/health/ready": {"get": _ready()},
    }


def _ready(parameters: tuple[Schema, ...] = (), problems: tuple[int, ...] = ()) -> Schema:
    found = _open("Should it get requests", _json(part("Ready")), parameters, problems)
    found["responses"]["503"] = _json(part("Ready"), "No, and why.")
    return found


def _paths_of_page() -> Schema:
    tag = _in("header", "if-none-match", TEXT, "The tag of what the browser has.")
    name = _in("path", "name", TEXT | {"minLength": 1}, "A file of it.")
    found: Schema = {}
    for path, kinds, parameters, problems in (
        ("/ui", ["text/html"], (tag,), ()), ("/ui/{name}", sorted(set(KINDS.values())), (name, tag), (404,)),
    ):  # fmt: skip
        answer = {"description": "A file.", "content": {kind: {"schema": TEXT} for kind in kinds}}
        found[path] = {"get": _open("The page", answer, parameters, problems)}
        found[path]["get"]["responses"]["304"] = {"description": "The browser has it."}
    return found


def _paths_of_model() -> Schema:
    """The model's own paths of the Open Inference Protocol, without a version and with one."""
    model, about = "/v2/models/vista", "Open Inference Protocol"
    version = _in("path", "version", TEXT | {"minLength": 1}, "A model version; only that which answers is there.")
    length = _in("header", HEADER_LENGTH, COUNT, "Bytes of the JSON, where tensors follow it in binary.")
    answer = _json(part("Inferred"))
    answer["content"] |= BINARY
    paths: Schema = {}
    for path, named, absent in ((model, (), ()), (f"{model}/versions/{{version}}", (version,), (404,))):
        paths[path] = {"get": _operation(f"{about}: the model", _json(part("ModelMetadata")), "", named, absent)}
        ready = _ready(named, absent)
        del ready["security"]
        paths[f"{path}/ready"] = {"get": ready}
        infer = _operation(f"{about}: rankings", answer, "Infer", (*named, length), (*WORK, 415, *absent))
        infer["requestBody"]["content"] |= BINARY
        paths[f"{path}/infer"] = {"post": infer}
    return paths


@cache
def openapi_document(has_token: bool = False, has_page: bool = True) -> Schema:
    """The whole document of a server that asks for a token, or not, and has the page, or not."""
    paths = _paths_v1() | _paths_of_machines() | _paths_of_model() | (_paths_of_page() if has_page else {})
    for methods in paths.values():
        for operation in methods.values():
            if has_token and "security" not in operation:
                operation["responses"] |= _said_by(401)
    return {
        "openapi": "3.1.0",
        "info": {"title": "vista serve", "version": version_of("vista-recsys")},
        "security": [{"token": []}] if has_token else [],
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "responses": {str(code): _problem(code) for code in PROBLEMS},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
