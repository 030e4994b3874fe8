"""gRPC as every service uses it: one set of channel options, one place where errors become statuses and where
callers prove who they are.

Connections notice a killed peer at once and a frozen one in about three seconds: without
`grpc.http2.ping_timeout_ms` a stopped peer goes unnoticed whatever the keepalive options say.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pagewire_core import tracing
from pagewire_core.announced_host import address_of
from pagewire_core.errors import ERROR_METADATA_KEY, STATUS, Internal, PagewireError, StartupError
from pagewire_core.tls import WORKER, TlsFiles, may_call, san

log = structlog.get_logger(__name__)

# Version of the rules between services, increased with every change that a peer could trip over. Neighbours work
# together, so that one service after the other can be upgraded: the older one leaves out what it does not know, and
# the newer one sees that and does without.
#   1  the first
#   2  a request can be resumed (DecodeRequest.prior, DecodeStarted.resumed); the shm lane; Drain
PROTOCOL = 2
SAMPLING_REVISION = 2  # of what a request may ask of a worker; see InfoResponse.sampling_revision
REQUEST_ID_KEY = "x-request-id"
MAX_MESSAGE_BYTES = 16 << 20
MAX_STREAMS = 8192  # calls that run at once on one connection

_COMMON_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
_SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a silent sharing
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Else of more than 1000 calls that come in one turn of the loop, some are cancelled without a word.
    ("grpc.server.max_pending_requests", MAX_STREAMS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing is sent away
]
# A pool of its own: a channel to a restarted peer must not reuse the dead one's connection.
_CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3000),  # despite its name: how long a connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(
    address: str, tls: TlsFiles | None = None, role: str = WORKER, service_config: str = "{}"
) -> grpc.aio.Channel:
    """A channel to `host:port` of another service of ours; with TLS only if a certificate says it has that role.

    service_config: JSON, as gRPC has it.
    """
    options = [*_CHANNEL_OPTIONS, ("grpc.service_config", service_config)]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    expected = ("grpc.ssl_target_name_override", san(role))
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=[*options, expected])


class RpcServer:
    """A gRPC server with health checking, reflection and error mapping.

    `add(adder, servicer, name)` before `start`; `stop` lets running calls finish for `grace_s`. With `tls` every
    client must have a certificate, and may call what its role allows.
    """

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=[_Interceptor(tls is not None)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names: list[str] = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._stopping: asyncio.Task[None] | None = None

    def add(self, adder: Callable[[Any, grpc.aio.Server], None], servicer: object, descriptor: Any) -> None:
        """Registers a servicer with the generated `add_...Servicer_to_server`; descriptor names the service."""
        adder(servicer, self._server)
        self._names.append(descriptor.full_name)

    def bind(self, host: str, port: int) -> int:
        """Takes the port (0: any free one) and returns it. Raises StartupError if it is taken."""
        warn_of_plain_text(host, self._tls is not None, "--tls-cert, --tls-key and --tls-ca")
        address = address_of(host, port)
        try:
            if self._tls is not None:
                return self._server.add_secure_port(address, self._tls.server_credentials())
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address}: the address is in use or not ours; choose another port"
            ) from error

    async def serve(self) -> None:
        """Begins to accept calls; every service has been added."""
        reflection.enable_server_reflection(self._names, self._server)
        await self._server.start()

    async def start(self, host: str, port: int) -> int:
        """`bind` and `serve`."""
        bound = self.bind(host, port)
        await self.serve()
        return bound

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends the server; calls that still run after `grace_s` are cancelled. The first call's grace counts."""
        # One stop only: in grpc.aio a second one that is still waiting when the first has freed the server
        # touches freed memory.
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait_closed(self) -> None:
        await self._server.wait_for_termination()


def warn_of_plain_text(host: str, encrypted: bool, remedy: str) -> None:
    """Says loudly that a port will be open to the network without any proof of who calls."""
    if not encrypted and not _is_loopback(host):
        log.warning(
            "LISTENING IN PLAIN TEXT on an address that others may reach: whoever does can read, use and "
            f"change everything here; keep the network private, or give {remedy}", host=host,
        )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def abort_with(context: grpc.aio.ServicerContext, error: PagewireError) -> None:
    """Ends a call with the error's status and the Error itself in the trailing metadata."""
    status, _ = STATUS[error.code]
    await context.abort(status, error.message, ((ERROR_METADATA_KEY, error.to_proto().SerializeToString()),))


class _Interceptor(grpc.aio.ServerInterceptor):
    """For every method of ours: turns away callers whose role may not call it, binds the request id and the caller's
    place in its trace to the context, and turns exceptions into statuses.
    """

    def __init__(self, authorise: bool) -> None:
        self._authorise = authorise

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/pagewire."):
            return handler
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        behaviour = {
            (False, False): "unary_unary",
            (False, True): "unary_stream",
            (True, False): "stream_unary",
            (True, True): "stream_stream",
        }[handler.request_streaming, handler.response_streaming]
        factory = getattr(grpc, f"{behaviour}_rpc_method_handler")
        return factory(
            wrap(getattr(handler, behaviour), handler_call_details.method, self._authorise),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _bind_request(context: grpc.aio.ServicerContext) -> None:
    structlog.contextvars.clear_contextvars()
    metadata = context.invocation_metadata() or ()
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            structlog.contextvars.bind_contextvars(request_id=value)
    tracing.enter(tracing.received(metadata))


async def _check_caller(context: grpc.aio.ServicerContext, method: str) -> None:
    names = context.auth_context().get("x509_subject_alternative_name", ())
    if not may_call(method, names):
        told = b", ".join(names).decode(errors="replace")
        log.warning("caller turned away", method=method, caller=told)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{told or 'a nameless peer'} may not call {method}")


@contextlib.asynccontextmanager
async def _mapped_errors(context: grpc.aio.ServicerContext, method: str) -> AsyncIterator[None]:
    try:
        yield
    except PagewireError as error:
        await abort_with(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        log.exception("call failed", method=method)
        await abort_with(context, Internal(f"internal error: {type(error).__name__}"))


def _wrap_unary(
    behaviour: Callable[..., Awaitable[Any]], method: str, authorise: bool
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if authorise:
            await _check_caller(context, method)
        _bind_request(context)
        async with _mapped_errors(context, method):
            return await behaviour(request, context)

    return call


def _wrap_stream(
    behaviour: Callable[..., AsyncGenerator[Any, None]], method: str, authorise: bool
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if authorise:
            await _check_caller(context, method)
        _bind_request(context)
        async with _mapped_errors(context, method):
            # aclosing: a vanished client must run the servicer's `finally` now, not at garbage collection.
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

    return call


def speaks(protocol: int) -> bool:
    """Whether a peer of that version can be worked with."""
    return abs(protocol - PROTOCOL) <= 1


def request_metadata(request_id: str, span: tracing.Span | None = None) -> Sequence[tuple[str, str]]:
    """Metadata that carries the request id to the next service's logs, and what the call is part of (None: what this
    task works on) to its trace.
    """
    return ((REQUEST_ID_KEY, request_id), *(span or tracing.current()).headers)
