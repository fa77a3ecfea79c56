"""The bodies of the HTTP interface, asked and answered, as JSON Schema; ``openapi.py`` has the paths.

Written by hand beside the answers they describe; the tests hold real answers to them.
"""

from __future__ import annotations

from typing import Any

from vista.serving.requests import (
    LARGEST_INTEGER,
    LATEST_US,
    LONGEST_AT,
    LONGEST_ID_BYTES,
    MAX_EXPLAINED,
    MAX_K,
)
from vista.serving.tensors import INPUTS, MAX_DIMENSIONS, OUTPUTS
from vista.updates.apply import OUTCOMES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
YES_NO: Schema = {"type": "boolean"}
ID: Schema = {
    "type": ["integer", "string"],
    "minimum": -LARGEST_INTEGER - 1,
    "maximum": LARGEST_INTEGER,
    "minLength": 1,
    "maxLength": LONGEST_ID_BYTES,
    "description": f"An integer of 64 bits, written without a fraction, or a string of up to {LONGEST_ID_BYTES} bytes.",
}
AT: Schema = {
    "type": ["string", "integer"],
    "maxLength": LONGEST_AT,
    "minimum": 0,
    "maximum": LATEST_US,
    "description": "ISO 8601, UTC where it names no zone, or microseconds since 1970.",
}
MOMENT: Schema = {"type": ["string", "null"], "description": "ISO 8601 in UTC; null where there is no event yet."}
OR_NULL_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
OR_NULL_ID: Schema = ID | {
    "type": ["integer", "string", "null"],
    "description": "null for what is not in the catalogue.",
}
SCORES: Schema = {"type": "object", "additionalProperties": SHARE, "description": "Probability by task."}
FEATURES: Schema = {"type": "object", "description": "The item's known features in the catalogue, by name."}
ANYTHING: Schema = {"type": "object"}


def said(schema: Schema, description: str) -> Schema:
    """A schema with what it means."""
    return schema | {"description": description}


def many(of: Schema, description: str = "") -> Schema:
    return {"type": "array", "items": of} | ({"description": description} if description else {})


def or_null(schema: Schema, meaning: str = "") -> Schema:
    """A schema that takes null, too, as what is left out; meaning: of null."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    told = f"{schema.get('description', '')} {meaning}".strip()
    return schema | {"type": [*kinds, "null"]} | ({"description": told} if told else {})


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
    at, own_id = or_null(AT, "Now where left out."), or_null(ID)
    action = own_id | {
        "type": ["integer", "number", "boolean", "string", "null"],
        "description": "As in the event log.",
    }
    ranking = leaving(obj(
        user=ID, candidates=many(ID, "A server has a limit of its own.") | {"minItems": 1}, at=at,
        context=or_null(said(ANYTHING, "By column, one value for all candidates or one each.")),
    ), "at", "context")  # fmt: skip
    event = leaving(obj(user=ID, item=ID, at=AT, action=action, event_id=own_id), "action", "event_id")
    filters = leaving(obj(
        exclude_seen=or_null(YES_NO), exclude=or_null(many(ID)),
        category=or_null({"type": "object", "additionalProperties": many(ID) | {"minItems": 1}}),
    ), "exclude_seen", "exclude", "category")  # fmt: skip
    few = ranking["properties"] | {"candidates": many(ID) | {"minItems": 1, "maxItems": MAX_EXPLAINED}}
    k = COUNT | {"minimum": 1, "maximum": MAX_K}
    return {
        "Ranking": ranking,
        "Explain": ranking | {"properties": few},
        "Events": obj(events=many(event, "A server has a limit of its own.") | {"minItems": 1}),
        "Recommend": leaving(obj(user=ID, k=k, at=at, filters=or_null(filters)), "at", "filters"),
        "Infer": _infer(),
    }


def _infer() -> Schema:
    """A request of the Open Inference Protocol in JSON; names that it does not know, it passes over."""
    parameters = or_null(ANYTHING)
    shape = many(COUNT | {"minimum": 1}) | {"minItems": 1, "maxItems": MAX_DIMENSIONS}
    datatypes = sorted({kind for kinds in INPUTS.values() for kind in kinds})
    data = said({"type": ["array", "null"]}, "Nested or flat; left out where it is sent in binary.")
    fields = {"name": {"enum": list(INPUTS)}, "datatype": {"enum": datatypes}, "shape": shape}
    fields |= {"parameters": parameters, "data": data}
    tensor = {"type": "object", "properties": fields, "required": ["name", "datatype", "shape"]}
    output = {"type": "object", "properties": {"name": {"enum": list(OUTPUTS)}, "parameters": parameters},
              "required": ["name"]}  # fmt: skip
    return {
        "type": "object",
        "properties": {
            "id": TEXT, "parameters": parameters, "inputs": many(tensor), "outputs": or_null(many(output)),
        },
        "required": ["inputs"],
    }  # fmt: skip


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
    } | _inferred()


def _inferred() -> dict[str, Schema]:
    """Answers of the Open Inference Protocol."""
    described = obj(name=TEXT, datatype=TEXT, shape=many(WHOLE, "-1 is any size."))
    tensor = obj(
        name={"enum": list(OUTPUTS)}, datatype=TEXT, shape=many(COUNT), data=many({"type": ["number", "boolean"]}),
        parameters=ANYTHING,
    )  # fmt: skip
    outputs = many(leaving(tensor, "data", "parameters"))
    return {
        "ServerMetadata": obj(name=TEXT, version=TEXT, extensions=many(TEXT)),
        "ModelMetadata": obj(
            name=TEXT, versions=many(TEXT), platform=TEXT, inputs=many(described), outputs=many(described)
        ),
        "Inferred": leaving(obj(model_name=TEXT, model_version=TEXT, id=TEXT, outputs=outputs), "id"),
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
        meetings_after=many(
            COUNT, "As recent_events: how many of the newest meetings came right after that event's item."
        ),
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
