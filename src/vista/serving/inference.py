"""The HTTP form of the Open Inference Protocol: JSON, with tensors in JSON or, behind it, in binary."""

from __future__ import annotations

import json
from typing import Any

from vista.errors import RequestError
from vista.serving.options import Limits
from vista.serving.requests import parse_json, shown
from vista.serving.tensors import (
    MODEL_NAME,
    Tensor,
    check_outputs,
    check_shape,
    check_type,
    from_bytes,
    from_values,
    to_bytes,
)

HEADER_LENGTH = "inference-header-content-length"
US_PER_S = 1e6


class InferRequest:
    """One request: its tensors, the outputs it wants, in which form, its id and its timeout."""

    def __init__(self, body: bytes, header_length: str | None, limits: Limits) -> None:
        """Raises RequestError."""
        head, binary = _split(body, header_length)
        given = parse_json(head)
        if not isinstance(given, dict) or not isinstance(given.get("inputs"), list):
            raise RequestError("body: give an object with a list of inputs")
        self.id = given.get("id", "")
        if not isinstance(self.id, str):
            raise RequestError(f"id is {shown(self.id)}; give a string")
        parameters = _parameters(given, "body")
        self.timeout_s = timeout_of(parameters)
        self.tensors: list[Tensor] = []
        rest = memoryview(binary)
        for one in given["inputs"]:
            tensor, rest = _input(one, rest, limits)
            self.tensors.append(tensor)
        if len(rest):
            raise RequestError(f"body: {len(rest)} bytes behind the tensors belong to none; check binary_data_size")
        self.outputs, self.is_binary = _outputs(given.get("outputs"), parameters)


def timeout_of(parameters: dict[str, Any]) -> float | None:
    """The parameter ``timeout``, microseconds, in seconds. Raises RequestError."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 1:
        raise RequestError(f"parameter timeout is {shown(timeout)}; give microseconds, an integer above 0")
    return min(timeout, 2**53) / US_PER_S


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    is_number = header_length.isascii() and header_length.isdecimal() and len(header_length) < 20
    if not is_number or int(header_length) > len(body):
        raise RequestError(
            f"{HEADER_LENGTH} is {shown(header_length)}; the body has {len(body)} bytes, give those of its JSON"
        )
    return body[: int(header_length)], body[int(header_length) :]


def _parameters(given: dict[str, Any], place: str) -> dict[str, Any]:
    parameters = given.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{place}: parameters is {shown(parameters)}; give an object")
    return parameters


def _outputs(given: Any, parameters: dict[str, Any]) -> tuple[list[str], dict[str, bool]]:
    """The names of the outputs wanted, and which of them in binary."""
    given = [] if given is None else given
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise RequestError(f"outputs is {shown(given)}; give a list of objects with a name")
    names = check_outputs([one.get("name") for one in given])
    is_binary = dict.fromkeys(names, bool(parameters.get("binary_data_output", False)))
    for one in given:
        wanted = _parameters(one, f"output {one['name']}").get("binary_data")
        if wanted is not None:
            is_binary[one["name"]] = bool(wanted)
    return names, is_binary


def _input(given: Any, rest: memoryview, limits: Limits) -> tuple[Tensor, memoryview]:
    """One input, and what is left of the binary part."""
    if not isinstance(given, dict):
        raise RequestError(f"an input is {shown(given)}; give an object")
    name, datatype = given.get("name"), given.get("datatype")
    check_type(name, datatype)
    shape = check_shape(given.get("shape"), str(name), limits)
    size = _parameters(given, f"input {name}").get("binary_data_size")
    if size is None:
        return from_values(str(name), str(datatype), shape, given.get("data")), rest
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
        raise RequestError(
            f"input {name}: binary_data_size is {shown(size)}, {len(rest)} bytes are left behind the JSON; send the "
            f"header {HEADER_LENGTH} with the length of the JSON"
        )
    return from_bytes(str(name), str(datatype), shape, rest[:size]), rest[size:]


def infer_answer(asked: InferRequest, version: str, tensors: list[Tensor]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for tensor in tensors:
        described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if asked.is_binary[tensor.name]:
            binary.append(to_bytes(tensor))
            described["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            described["data"] = tensor.data.ravel().tolist()
        outputs.append(described)
    head: dict[str, Any] = {"model_name": MODEL_NAME, "model_version": version, "outputs": outputs}
    if asked.id:
        head["id"] = asked.id
    text = json.dumps(head).encode()
    if not binary:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *binary]), headers
