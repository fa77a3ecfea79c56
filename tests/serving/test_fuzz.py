"""A real server against its own description: whatever is sent, the answer is one that ``/openapi.json`` names.

schemathesis makes requests that keep to the description and such that break it; what no description can make, bodies
that are not even JSON, is made here. Always the same ones: the seed is fixed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.test_server import AT, LIMITS, Served, serving
from vista.serving.openapi import openapi_document
from vista.serving.requests import TIMEOUT_HEADER

pytestmark = pytest.mark.slow

TOKEN = {"Authorization": "Bearer secret"}
DOCUMENT = openapi_document(has_token=True)
OPERATIONS = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods]
ASKING = [path for method, path in OPERATIONS if method == "post"]
FIXED = settings(
    max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a token; with time enough that no answer is late but where a request says so itself."""
    limits = replace(LIMITS, timeout_s=60.0)
    with serving(tmp_path_factory.mktemp("fuzzed"), token=b"secret", limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def described(served: Served) -> Any:
    # a wrong request is refused, with nothing else; or its deadline, of a millisecond, say, passed before it was read
    refused = {"expected-statuses": [400, 401, 404, 413, 415, 408, 429, 504]}
    config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": refused}})
    return schemathesis.openapi.from_url(f"{served.running.url}/openapi.json", config=config)


def no_failure(context: Any, response: Any, case: Any) -> None:
    """No 5xx, but the 504 of a request that named a deadline."""
    has_deadline = TIMEOUT_HEADER in (case.headers or {}) or "timeout" in str(case.body)
    assert response.status_code < 500 or (response.status_code == 504 and has_deadline), response.text


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_by_the_description_and_against_it(described, method, path):
    """Status, media type, headers and body as described; what breaks the description is refused, as is no token.

    What keeps to it is taken, but for bodies: which columns and categories there are, no description can say.
    """
    operation, modes, checks = described[path][method], schemathesis.GenerationMode, schemathesis.checks
    excluded = [checks.not_a_server_error] + ([checks.positive_data_acceptance] if method == "post" else [])

    @FIXED
    @given(case=operation.as_strategy(modes.POSITIVE) | operation.as_strategy(modes.NEGATIVE))
    def check(case: Any) -> None:
        case.call_and_validate(headers=TOKEN, additional_checks=[no_failure], excluded_checks=excluded)

    check()


# -- what no description can make

EVENT = {"user": 1, "item": 1, "at": AT}
USER = {"name": "user", "datatype": "INT64", "shape": [1], "data": [7]}
ITEMS = {"name": "candidates", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]}
INFER = {"inputs": [USER, ITEMS], "outputs": [{"name": "scores"}]}
FINE = {
    "/v1/rank": {"user": 1, "candidates": [1, 2], "at": AT, "context": {"price": 1.5}},
    "/v1/recommend": {"user": 1, "k": 3, "filters": {"exclude": [1], "exclude_seen": True}},
    "/v1/events": {"events": [EVENT]},
    "/v1/explain": {"user": 1, "candidates": [1, 2]},
    "/v2/models/vista/infer": INFER,
    "/v2/models/vista/versions/{version}/infer": INFER,
}
STRANGE = [
    "NaN", "-Infinity", "1e999", "-0.0", "1" + "0" * 4000, "9223372036854775808", "null", "true", "", "{}", "[]",
    "\xff", '"\\ud800"', '"\\u0000"', '"' + "a" * 19_000 + '"', '{"a": 1, "a": 2}',
    "[" * 9000, '{"a":' * 3000, "[" + "1," * 9000 + "1]",
]  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn, fine: bytes) -> bytes:
    """A fine body with one value strange, some bytes changed, cut off, or too large; or any bytes."""
    kind = draw(st.sampled_from(["strange", "changed", "cut", "large", "any"]))
    if kind == "any":
        return draw(st.binary(max_size=300))
    if kind == "large":
        return fine + b" " * draw(st.integers(LIMITS.max_body_bytes - len(fine) - 1, 2 * LIMITS.max_body_bytes))
    if kind == "cut":
        return fine[: draw(st.integers(0, len(fine)))]
    place = draw(st.integers(0, len(fine) - 1))
    if kind == "changed":
        return fine[:place] + draw(st.binary(min_size=1, max_size=4)) + fine[place + draw(st.integers(0, 3)) :]
    ends = [place for place, byte in enumerate(fine) if byte in b",]}"]
    end = draw(st.sampled_from(ends))
    begin = max(fine.rfind(byte, 0, end) for byte in (b": ", b"[", b", "))
    return fine[: begin + 1] + draw(st.sampled_from(STRANGE)).encode("latin-1") + fine[end:]


def check_described(path: str, answer: httpx.Response) -> None:
    """Raise unless the description has such an answer."""
    response = DOCUMENT["paths"][path]["post"]["responses"][str(answer.status_code)]
    response = (
        DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]] if "$ref" in response else response
    )
    content = response["content"][answer.headers["content-type"]]
    assert set(response.get("headers", ())) <= set(answer.headers)
    jsonschema.Draft202012Validator(content["schema"] | {"components": DOCUMENT["components"]}).validate(answer.json())


@pytest.mark.parametrize("path", ASKING)
def test_bodies_that_are_malformed_huge_deep_or_not_text(served, path):
    counts: Counter[int] = Counter()

    @settings(FIXED, max_examples=300)
    @given(bodies(json.dumps(FINE[path]).encode()))
    def check(body: bytes) -> None:
        answer = served.post(path.format(version=served.run.version), body, **TOKEN)
        assert answer.status_code < 500, answer.text
        check_described(path, answer)
        counts[answer.status_code] += 1

    check()
    assert {200, 400, 413} <= set(counts), f"some of each, or the bodies show nothing: {counts}"
