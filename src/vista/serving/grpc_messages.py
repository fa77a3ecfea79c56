"""The messages of the Open Inference Protocol's gRPC service, described in code.

Names, types and field numbers are those of the open specification (service ``inference.GRPCInferenceService``, version
2); wire-compatible with every client of it. Described here and not generated, so that no version of the protobuf
compiler is tied to one of its runtime; in a pool of their own, so that a client in the same process does not collide.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
Field = descriptor_pb2.FieldDescriptorProto

SCALARS = {
    "string": Field.TYPE_STRING, "bool": Field.TYPE_BOOL, "bytes": Field.TYPE_BYTES, "int64": Field.TYPE_INT64,
    "int32": Field.TYPE_INT32, "uint32": Field.TYPE_UINT32, "uint64": Field.TYPE_UINT64, "float": Field.TYPE_FLOAT,
    "double": Field.TYPE_DOUBLE,
}  # fmt: skip

# message -> fields: number, name, type; "*" behind a type: repeated; "map": string to InferParameter
MESSAGES: dict[str, list[tuple[int, str, str]]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": [(1, "live", "bool")],
    "ServerReadyRequest": [],
    "ServerReadyResponse": [(1, "ready", "bool")],
    "ModelReadyRequest": [(1, "name", "string"), (2, "version", "string")],
    "ModelReadyResponse": [(1, "ready", "bool")],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": [(1, "name", "string"), (2, "version", "string"), (3, "extensions", "string*")],
    "ModelMetadataRequest": [(1, "name", "string"), (2, "version", "string")],
    "ModelMetadataResponse": [
        (1, "name", "string"), (2, "versions", "string*"), (3, "platform", "string"),
        (4, "inputs", "ModelMetadataResponse.TensorMetadata*"), (5, "outputs", "ModelMetadataResponse.TensorMetadata*"),
    ],
    "ModelMetadataResponse.TensorMetadata": [(1, "name", "string"), (2, "datatype", "string"), (3, "shape", "int64*")],
    "InferParameter": [
        (1, "bool_param", "bool"), (2, "int64_param", "int64"), (3, "string_param", "string"),
        (4, "double_param", "double"), (5, "uint64_param", "uint64"),
    ],
    "InferTensorContents": [
        (1, "bool_contents", "bool*"), (2, "int_contents", "int32*"), (3, "int64_contents", "int64*"),
        (4, "uint_contents", "uint32*"), (5, "uint64_contents", "uint64*"), (6, "fp32_contents", "float*"),
        (7, "fp64_contents", "double*"), (8, "bytes_contents", "bytes*"),
    ],
    "ModelInferRequest": [
        (1, "model_name", "string"), (2, "model_version", "string"), (3, "id", "string"), (4, "parameters", "map"),
        (5, "inputs", "ModelInferRequest.InferInputTensor*"),
        (6, "outputs", "ModelInferRequest.InferRequestedOutputTensor*"), (7, "raw_input_contents", "bytes*"),
    ],
    "ModelInferRequest.InferInputTensor": [
        (1, "name", "string"), (2, "datatype", "string"), (3, "shape", "int64*"), (4, "parameters", "map"),
        (5, "contents", "InferTensorContents"),
    ],
    "ModelInferRequest.InferRequestedOutputTensor": [(1, "name", "string"), (2, "parameters", "map")],
    "ModelInferResponse": [
        (1, "model_name", "string"), (2, "model_version", "string"), (3, "id", "string"), (4, "parameters", "map"),
        (5, "outputs", "ModelInferResponse.InferOutputTensor*"), (6, "raw_output_contents", "bytes*"),
    ],
    "ModelInferResponse.InferOutputTensor": [
        (1, "name", "string"), (2, "datatype", "string"), (3, "shape", "int64*"), (4, "parameters", "map"),
        (5, "contents", "InferTensorContents"),
    ],
}  # fmt: skip
ONEOF = {"InferParameter": "parameter_choice"}


def _messages() -> dict[str, Any]:
    """A class per message."""
    file = descriptor_pb2.FileDescriptorProto(name="vista_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in MESSAGES.items():
        outer, _, inner = name.partition(".")
        message = made[outer].nested_type.add(name=inner) if inner else file.message_type.add(name=name)
        made[name] = message
        if name in ONEOF:
            message.oneof_decl.add(name=ONEOF[name])
        for number, field_name, kind in fields:
            _add_field(message, name, number, field_name, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


def _add_field(message: Any, owner: str, number: int, name: str, kind: str) -> None:
    if kind == "map":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", 1, "key", "string")
        _add_field(entry, "", 2, "value", "InferParameter")
        kind = f"{owner}.{entry.name}*"
    field = message.field.add(name=name, number=number)
    field.label = Field.LABEL_REPEATED if kind.endswith("*") else Field.LABEL_OPTIONAL
    kind = kind.removesuffix("*")
    field.type = SCALARS.get(kind, Field.TYPE_MESSAGE)
    if kind not in SCALARS:
        field.type_name = f".{PACKAGE}.{kind}"
    if owner in ONEOF:
        field.oneof_index = 0


CLASSES = _messages()
