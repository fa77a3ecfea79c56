"""The gRPC form of the Open Inference Protocol, on the same event loop and the same service as HTTP."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vista.errors import ConfigError, RequestError
from vista.serving.grpc_messages import CLASSES, SERVICE
from vista.serving.http import check_version, model_metadata, server_metadata
from vista.serving.inference import timeout_of
from vista.serving.logs import say
from vista.serving.middleware import check_token, told
from vista.serving.options import Limits, ServeOptions
from vista.serving.requests import shown
from vista.serving.service import Service
from vista.serving.tensors import (
    MODEL_NAME,
    Tensor,
    answer_tensors,
    check_outputs,
    check_shape,
    check_type,
    from_bytes,
    from_values,
    queries_of,
    to_bytes,
)

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT, 429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL, 503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}
OPEN_METHODS = ("ServerLive", "ServerReady")  # a prober has no token
Handler = Callable[[Any, Any, dict[str, Any]], Awaitable[Any]]  # request, context, facts


class GrpcServer:
    """The service ``inference.GRPCInferenceService``."""

    def __init__(self, options: ServeOptions, service: Service, token: bytes | None) -> None:
        self._options, self._service, self._token = options, service, token
        methods: dict[str, Handler] = {
            "ServerLive": self._server_live, "ServerReady": self._server_ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata, "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }  # fmt: skip
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._around(name, handler),  # gets bytes: gRPC itself would call those that are no message our failure
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name, handler in methods.items()
        }
        most = service.limits.max_body_bytes
        settings = [("grpc.max_receive_message_length", most), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=settings)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self) -> int:
        """The port it listens on. Raises ConfigError where that cannot be had."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        address = f"{host}:{self._options.grpc_port}"
        try:
            if self._options.tls_cert is not None and self._options.tls_key is not None:
                pair = (self._options.tls_key.read_bytes(), self._options.tls_cert.read_bytes())
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{address} cannot be had ({error}); choose another with --grpc-port") from error
        await self._server.start()
        return int(port)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    def _around(self, name: str, handler: Handler) -> Callable[[Any, Any], Awaitable[Any]]:
        """The token, a line in the log, counts and times, and a status whatever happens."""

        async def handle(body: bytes, context: Any) -> Any:
            began_s, status, problem = time.monotonic(), 200, ""
            facts: dict[str, Any] = {"stages": {}}
            try:
                self._check_token(name, context)
                return await handler(parsed(f"{name}Request", body), context, facts)
            except Exception as error:
                status, problem, _ = told(error)
            finally:
                self._observe(name, status, problem, facts["stages"] | {"total": time.monotonic() - began_s})
            await context.abort(CODES.get(status, grpc.StatusCode.UNKNOWN), problem)

        return handle

    def _check_token(self, name: str, context: Any) -> None:
        if self._token is not None and name not in OPEN_METHODS:
            given = dict(context.invocation_metadata() or ()).get("authorization", "")
            check_token(given if isinstance(given, bytes) else str(given).encode(), self._token)

    def _observe(self, name: str, status: int, problem: str, stages: dict[str, float]) -> None:
        endpoint = f"grpc {name}"
        code = "OK" if status == 200 else CODES.get(status, grpc.StatusCode.UNKNOWN).name
        self._service.metrics.requests.labels(endpoint, code).inc()
        for stage, seconds in stages.items():
            self._service.metrics.stage.labels(endpoint, stage).observe(seconds)
        times = {f"{stage}_ms": round(seconds * 1000, 3) for stage, seconds in stages.items()}
        say("request", endpoint=endpoint, status=code, problem=problem, **times)

    # -- the methods

    async def _server_live(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        return CLASSES["ServerLiveResponse"](live=True)

    async def _server_ready(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        return CLASSES["ServerReadyResponse"](ready=not self._service.why_not_ready())

    async def _model_ready(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        self._check_model(request.name, request.version)
        return CLASSES["ModelReadyResponse"](ready=not self._service.why_not_ready())

    async def _server_metadata(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        return CLASSES["ServerMetadataResponse"](**server_metadata())

    async def _model_metadata(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        self._check_model(request.name, request.version)
        return CLASSES["ModelMetadataResponse"](**model_metadata(self._service))

    async def _model_infer(self, request: Any, context: Any, facts: dict[str, Any]) -> Any:
        self._check_model(request.model_name, request.model_version)
        limits, model = self._service.limits, self._service.model
        tensors = tensors_of(request, limits)
        wanted = check_outputs([output.name for output in request.outputs])
        queries, is_batch = queries_of(model, tensors, limits)
        timeouts = [context.time_remaining(), _timeout_s(request)]
        timeout_s = min((one for one in timeouts if one is not None), default=None)
        found = await self._service.rank_many(queries, self._service.deadline_s(timeout_s))
        facts["stages"] = found[0].stages
        made = answer_tensors(found, is_batch, wanted)
        outputs = [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in made]
        return CLASSES["ModelInferResponse"](
            model_name=MODEL_NAME, model_version=model.version, id=request.id, outputs=outputs,
            raw_output_contents=[to_bytes(tensor) for tensor in made],
        )  # fmt: skip

    def _check_model(self, name: str, version: str) -> None:
        if name != MODEL_NAME:
            raise RequestError(f"there is no model {shown(name)}; the model is {MODEL_NAME!r}", 404)
        check_version(self._service, version)


def parsed(name: str, body: bytes) -> Any:
    """A message. Raises RequestError for bytes that are none."""
    try:
        return CLASSES[name].FromString(body)
    except DecodeError as error:
        raise RequestError(f"{len(body)} bytes that are no {name} of the protocol ({error})") from error


def _timeout_s(request: Any) -> float | None:
    """The parameter ``timeout`` of a request. Raises RequestError."""
    if "timeout" not in request.parameters:
        return None
    parameter = request.parameters["timeout"]
    return timeout_of({"timeout": getattr(parameter, parameter.WhichOneof("parameter_choice") or "int64_param")})


def tensors_of(request: Any, limits: Limits) -> list[Tensor]:
    """The inputs of a request, raw or typed. Raises RequestError."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; give one each, or none")
    tensors = []
    for place, given in enumerate(request.inputs):
        check_type(given.name, given.datatype)
        shape = check_shape(list(given.shape), given.name, limits)
        if raw:
            tensors.append(from_bytes(given.name, given.datatype, shape, raw[place]))
        else:
            values = list(getattr(given.contents, CONTENTS[given.datatype]))
            tensors.append(from_values(given.name, given.datatype, shape, values))
    return tensors
