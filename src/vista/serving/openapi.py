"""The description of the HTTP interface, OpenAPI 3.1, served at ``/openapi.json``.

Written by hand beside the answers it describes; the tests hold every route and real answers to it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version as version_of
from typing import Any

from vista.serving.requests import MAX_EXPLAINED, MAX_K
from vista.updates.apply import OUTCOMES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
YES_NO: Schema = {"type": "boolean"}
ID: Schema = {"type": ["integer", "string"], "description": "An integer of 64 bits, or a string."}
AT: Schema = {
    "type": ["string", "integer", "null"],
    "description": "ISO 8601, UTC where it names no zone, or microseconds since 1970; now where left out.",
}
MOMENT: Schema = {"type": ["string", "null"], "description": "ISO 8601 in UTC; null where there is no event yet."}
OR_NULL_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
OR_NULL_ID: Schema = {"type": ["integer", "string", "null"], "description": "null for what is not in the catalogue."}
SCORES: Schema = {"type": "object", "additionalProperties": SHARE, "description": "Probability by task."}
FEATURES: Schema = {"type": "object", "description": "The item's known features in the catalogue, by name."}
ANYTHING: Schema = {"type": "object"}


def said(schema: Schema, description: str) -> Schema:
    """A schema with what it means."""
    return schema | {"description": description}


def many(of: Schema, description: str = "") -> Schema:
    return {"type": "array", "items": of} | ({"description": description} if description else {})


def obj(**fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def leaving(schema: Schema, *names: str) -> Schema:
    """An object in which these may be absent."""
    return schema | {"required": [name for name in schema["required"] if name not in names]}


def part(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


ABOUT_USER = {
    "user": ID,
    "model_version": TEXT,
    "is_known_user": said(YES_NO, "false: a cold start, the model's answer to an empty history."),
    "num_events": said(COUNT, "Events of the user in the state."),
    "as_of": said(MOMENT, "The newest of them."),
    "at": TEXT,
    "is_degraded": said(YES_NO, "The store is away; answered as a cold start."),
    "tasks": many(TEXT),
}
EVENT = {
    "item": OR_NULL_ID, "is_known": YES_NO, "features": FEATURES, "action": {"type": ["string", "integer", "null"]},
    "at": TEXT,
}  # fmt: skip
PLACED = {"place": said(COUNT, "In the history, from 0.")} | EVENT


def schemas() -> dict[str, Schema]:
    """The bodies, by name."""
    return _asked() | _answered() | _looked()


def _asked() -> dict[str, Schema]:
    ranking = leaving(obj(
        user=ID, candidates=many(ID) | {"minItems": 1}, at=AT,
        context=said({"type": ["object", "null"]}, "By column, one value for all candidates or one each."),
    ), "at", "context")  # fmt: skip
    event = leaving(obj(user=ID, item=ID, at=AT, action=OR_NULL_ID, event_id=OR_NULL_ID), "action", "event_id")
    filters = leaving(obj(
        exclude_seen=YES_NO, exclude=many(ID),
        category={"type": "object", "additionalProperties": many(ID)},
    ), "exclude_seen", "exclude", "category")  # fmt: skip
    few = ranking["properties"] | {"candidates": many(ID) | {"minItems": 1, "maxItems": MAX_EXPLAINED}}
    return {
        "Ranking": ranking,
        "Explain": ranking | {"properties": few},
        "Events": obj(events=many(event)),
        "Recommend": leaving(
            obj(user=ID, k=COUNT | {"minimum": 1, "maximum": MAX_K}, at=AT, filters=filters), "at", "filters"
        ),
    }


def _answered() -> dict[str, Schema]:
    recent = {name: schema for name, schema in EVENT.items() if name != "features"}
    return {
        "Error": obj(error=said(TEXT, "Place, value and remedy."), request_id=TEXT),
        "Ranked": obj(**ABOUT_USER, candidates=many(obj(item=ID, is_known=YES_NO, scores=SCORES), "Best first.")),
        "Recommended": obj(
            **ABOUT_USER,
            num_scored=COUNT,
            is_exact=said(YES_NO, "Every item was scored, none left out by a first stage."),
            items=many(obj(item=ID, scores=SCORES), "Best first."),
        ),
        "Posted": obj(
            model_version=TEXT,
            outcomes=many({"enum": list(OUTCOMES)}, "One word per event."),
            counts={"type": "object", "additionalProperties": COUNT},
        ),
        "User": obj(
            user=ID,
            num_events=COUNT,
            as_of=MOMENT,
            freshness_s={"type": ["number", "null"]},
            model_version=TEXT,
            tokens=obj(number=COUNT, width=COUNT, codec=TEXT),
            recent_events=many(obj(**recent), "Newest first."),
        ),
        "Alive": obj(live=YES_NO),
        "Ready": leaving(obj(ready=YES_NO, model_version=TEXT, problem=TEXT), "problem"),
    }


def _looked() -> dict[str, Schema]:
    attention = obj(
        tokens=many(SHARE), recent_events=many(SHARE, "As recent_events of the answer."), itself=SHARE,
    ) | {"description": "Weights of the ranker's own pass, means over heads and blocks; they add up to 1."}  # fmt: skip
    counted = obj(
        feature=said({"type": ["string", "null"]}, "null: the item itself."), events=COUNT, events_since=OR_NULL_COUNT,
        seconds_since=OR_NULL_COUNT,
    )  # fmt: skip
    candidate = obj(
        item=ID,
        is_known=YES_NO,
        features=FEATURES,
        scores=SCORES,
        attention=attention,
        scores_without={"type": "object", "additionalProperties": SCORES},
        counted=many(counted, "What exact counts say, where the model has a sketch."),
    )
    token = obj(
        traced=said(SHARE, "How much of the token its known events wrote."),
        by_bin=many(SHARE, "The same by stretch of the history, oldest first."),
        events=many(obj(**PLACED, share=SHARE), "Those with the largest shares."),
    )
    head = {"user": ID, "model_version": TEXT, "num_events": COUNT}
    note = said(TEXT, "Why older events are not there, or empty.")
    return {
        "Explained": obj(
            **ABOUT_USER, num_tokens=COUNT, recent_events=many(obj(**EVENT), "Newest first."),
            candidates=many(candidate, "Best first."),
        ),
        "Users": obj(model_version=TEXT, users=many(obj(user=ID, num_events=COUNT, as_of=MOMENT))),
        "History": obj(
            **head, num_missing=COUNT, note=note, first_at=MOMENT, last_at=MOMENT,
            by_time=many(COUNT, "Known events in equal stretches of time between first_at and last_at."),
            next_before=OR_NULL_COUNT, events=many(obj(**PLACED), "Newest first."),
        ),
        "Tokens": obj(
            **head, num_summarized=said(COUNT, "Events that the tokens were read from."), num_traced=COUNT, note=note,
            why_not=said(TEXT, "Why no share can be told, or empty."), num_bins=COUNT, tokens=many(token),
        ),
        "Status": _status(),
    }  # fmt: skip


def _status() -> Schema:
    numbers = ("num_tokens", "width", "segment_events", "recent_events", "sketch_slots", "num_items")
    version = obj(version=TEXT, num_users=COUNT, expected_users=COUNT, is_complete=YES_NO, created=MOMENT)
    return obj(
        server_version=TEXT,
        uptime_s=NUMBER,
        problem=said(TEXT, "Why the server is not ready, or empty."),
        model=obj(version=TEXT, tasks=many(TEXT), memory=TEXT, **dict.fromkeys(numbers, COUNT)),
        store=obj(url=TEXT, is_up=YES_NO, published={"type": ["string", "null"]}, versions=many(version)),
    )


def _json(schema: Schema, description: str = "The answer.") -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(
    summary: str, answer: Schema, body: str = "", parameters: tuple[Schema, ...] = (), is_open: bool = False
) -> Schema:
    found: Schema = {"summary": summary, "responses": {"200": answer}}
    found["responses"]["default"] = _json(part("Error"), "What is wrong, and what to do about it.")
    if body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": part(body)}}}
    if parameters:
        found["parameters"] = list(parameters)
    return found | ({"security": []} if is_open else {})


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": TEXT}


def _in_query(name: str, description: str) -> Schema:
    return {"name": name, "in": "query", "schema": COUNT, "description": description}


def _paths_v1() -> Schema:
    user = _in_path("id")
    limit, before = _in_query("limit", "How many at most."), _in_query("before", "A place; events before it.")
    return {
        "/v1/rank": {"post": _operation("Rank given candidates", _json(part("Ranked")), "Ranking")},
        "/v1/recommend": {"post": _operation("The best items of all", _json(part("Recommended")), "Recommend")},
        "/v1/events": {"post": _operation("New events, durable when answered", _json(part("Posted")), "Events")},
        "/v1/explain": {"post": _operation("Rank, and say why", _json(part("Explained")), "Explain")},
        "/v1/users": {"get": _operation("Some users of the store", _json(part("Users")), parameters=(limit,))},
        "/v1/users/{id}": {"get": _operation("What the store has of a user", _json(part("User")), parameters=(user,))},
        "/v1/history/{id}": {
            "get": _operation("A user's events", _json(part("History")), parameters=(user, limit, before))
        },
        "/v1/tokens/{id}": {
            "get": _operation(
                "Which events wrote a user's summary tokens", _json(part("Tokens")),
                parameters=(user, _in_query("events", "How many of each token at most.")),
            )
        },
        "/v1/status": {"get": _operation("Model, store and state of the server", _json(part("Status")))},
    }  # fmt: skip


def _paths_of_machines() -> Schema:
    model, version = "/v2/models/vista", _in_path("version")
    alive = _operation("Is the process alive", _json(part("Alive")), is_open=True)
    ready = _operation("Should it get requests", _json(part("Ready")), is_open=True)
    ready["responses"]["503"] = _json(part("Ready"), "No, and why.")
    paths: Schema = {
        "/livez": {"get": alive},
        "/readyz": {"get": ready},
        "/metrics": {"get": _operation("Counts and times", {"description": "Prometheus's text format."})},
        "/openapi.json": {"get": _operation("This description", _json(ANYTHING), is_open=True)},
        "/ui": {"get": _operation("The page", {"description": "HTML."}, is_open=True)},
        "/ui/{name}": {"get": _operation("A file of it", {"description": "A file."}, "", (_in_path("name"),), True)},
        "/v2": {"get": _operation("Open Inference Protocol: the server", _json(ANYTHING))},
        "/v2/health/live": {"get": alive},
        "/v2/health/ready": {"get": ready},
    }
    for path, parameters in ((model, ()), (f"{model}/versions/{{version}}", (version,))):
        paths[path] = {"get": _operation("Open Inference Protocol: the model", _json(ANYTHING), "", parameters)}
        paths[f"{path}/ready"] = {"get": ready | {"security": [{}, {"token": []}], "parameters": list(parameters)}}
        infer = _operation("Open Inference Protocol: rankings", _json(ANYTHING), "", parameters)
        body = {"required": True, "content": {"application/json": {"schema": ANYTHING}}}
        paths[f"{path}/infer"] = {"post": infer | {"requestBody": body}}
    return paths


@cache
def openapi_document() -> Schema:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "vista serve", "version": version_of("vista-recsys")},
        "security": [{}, {"token": []}],
        "paths": _paths_v1() | _paths_of_machines(),
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
