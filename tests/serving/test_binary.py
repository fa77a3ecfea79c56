"""Tensors in binary, over both protocols: whatever the bytes, the same answer, and it is no failure of the server."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.serving.server import CONTEXT
from tests.serving.test_server import AT_US, Served, serving
from vista.serving.grpc_messages import CLASSES, SERVICE
from vista.serving.grpc_server import CODES

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SAME = {200: grpc.StatusCode.OK, **CODES}
Given = list[tuple[str, str, list[int], bytes]]  # name, datatype, shape, bytes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("binary")) as found:
        yield found


@pytest.fixture(scope="module")
def call(served: Served) -> Iterator[Callable[[str, bytes], tuple[grpc.StatusCode, bytes]]]:
    """Call a method with any bytes: status, and the answer's bytes or the reason."""
    with grpc.insecure_channel(f"127.0.0.1:{served.running.grpc_port}") as channel:

        def ask(method: str, body: bytes) -> tuple[grpc.StatusCode, bytes]:
            try:
                return grpc.StatusCode.OK, channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=20)
            except grpc.RpcError as error:
                return error.code(), error.details().encode()

        yield ask


TEXTS = st.text(min_size=1, max_size=5).map(str.encode) | st.just(b"7")


def elements(values: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@st.composite
def inputs(draw: st.DrawFn) -> Given:
    """Tensors that are fine as a whole, and then perhaps one of them is not."""
    users, items = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ids = draw(st.sampled_from(["INT64", "BYTES"]))

    def some_ids(number: int) -> bytes:
        if ids == "INT64":
            whole = st.integers(-(2**63), 2**63 - 1)
            return np.array(draw(st.lists(whole, min_size=number, max_size=number))).tobytes()
        return elements(draw(st.lists(TEXTS, min_size=number, max_size=number)))

    size = users * items * len(CONTEXT)
    columns = draw(st.lists(st.integers(0, 1023) | st.just(np.nan), min_size=size, max_size=size))
    found: Given = [
        ("user", ids, [users], some_ids(users)),
        ("candidates", ids, [users, items], some_ids(users * items)),
        ("at_us", "INT64", [1], AT_US.to_bytes(8, "little")),
        ("context", "FP32", [users, items, len(CONTEXT)], np.array(columns, np.float32).tobytes()),
    ]
    place = draw(st.integers(0, 2 * len(found)))  # half of the time none
    if place < len(found):
        name, datatype, shape, raw = found[place]
        found[place] = draw(st.sampled_from([
            (name, datatype, shape, raw[: draw(st.integers(0, len(raw)))]),
            (name, datatype, shape, raw + draw(st.binary(min_size=1, max_size=9))),
            (name, datatype, shape, draw(st.binary(min_size=len(raw), max_size=len(raw)))),
            (name, draw(st.sampled_from(["INT64", "BYTES", "FP32", "BOOL", ""])), shape, raw),
            (name, datatype, draw(st.lists(st.integers(-1, 2**62), max_size=4)), raw),
            (draw(st.sampled_from(["user", "users", "context"])), datatype, shape, raw),
        ]))  # fmt: skip
    return found


def over_http(served: Served, tensors: Given) -> tuple[int, bytes]:
    """Status, and the scores' bytes or the reason."""
    head = json.dumps({
        "inputs": [{"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
                   for name, datatype, shape, raw in tensors],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    body = head + b"".join(raw for *_, raw in tensors)
    answer = served.post("/v2/models/vista/infer", body, **{"inference-header-content-length": str(len(head))})
    if answer.status_code != 200:
        return answer.status_code, answer.json()["error"].encode()
    return 200, answer.content[int(answer.headers["inference-header-content-length"]) :]


def message(tensors: Given) -> bytes:
    described = [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape, _ in tensors]
    asked: Any = CLASSES["ModelInferRequest"](
        model_name="vista", inputs=described, raw_input_contents=[raw for *_, raw in tensors],
        outputs=[{"name": "scores"}],
    )  # fmt: skip
    return bytes(asked.SerializeToString())


@QUICK
@given(inputs())
@example([("user", "BYTES", [1], elements([b"anna"])), ("candidates", "INT64", [2], np.array([1, 2]).tobytes())])
@example([("user", "BYTES", [1], elements([b"\xff"])), ("candidates", "INT64", [2], np.array([1, 2]).tobytes())])
@example([("user", "BYTES", [1], b"\xff\xff\xff\xffa"), ("candidates", "INT64", [2], np.array([1, 2]).tobytes())])
def test_any_bytes_of_tensors_get_the_same_answer_over_both(served, call, tensors):
    status, said = over_http(served, tensors)
    assert status in (200, 400, 413), said
    code, answer = call("ModelInfer", message(tensors))
    assert code == SAME[status], (said, answer)
    if status == 200:
        (scores,) = CLASSES["ModelInferResponse"].FromString(answer).raw_output_contents
        np.testing.assert_allclose(np.frombuffer(scores, "<f4"), np.frombuffer(said, "<f4"), rtol=1e-5)
    else:
        assert answer == said, "with the same reason"


METHODS = sorted(name.removesuffix("Request") for name in CLASSES if name.endswith("Request"))
FINE = message([("user", "INT64", [1], bytes(8)), ("candidates", "INT64", [1], bytes(8))])
REFUSALS = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@QUICK
@given(
    st.sampled_from(METHODS),
    st.binary(max_size=60)
    | st.builds(
        lambda place, other: FINE[:place] + other + FINE[place + 1 :], st.integers(0, len(FINE)), st.binary(max_size=3)
    ),
)
@example("ModelInfer", b"\xff")
@example("ModelInfer", b"\x12\x01\xff")  # a name that is not UTF-8
def test_bytes_that_are_no_message_are_no_failure(call, method, body):
    """Of the server: those who send them are told so."""
    code, said = call(method, body)
    assert code in REFUSALS, said
