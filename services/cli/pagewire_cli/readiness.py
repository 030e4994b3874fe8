"""Is a service ready to be used? One question per protocol; each answers within two seconds."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import quote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from pagewire_core.redis_link import REDIS_ERRORS, ping
from pagewire_core.rpc import open_channel
from pagewire_core.tls import ROUTER, WORKER, TlsFiles

_TIMEOUT_S = 2.0


async def redis_answers(address: str) -> bool:
    """`address`: host:port, or the path of a socket."""
    try:
        await ping(f"unix://{quote(address)}" if address.startswith("/") else f"redis://{address}")
    except REDIS_ERRORS:
        return False
    return True


async def router_serves(address: str, tls: TlsFiles | None = None) -> bool:
    return await grpc_serves(address, tls, ROUTER)


async def grpc_serves(address: str, tls: TlsFiles | None = None, role: str = WORKER) -> bool:
    """The standard gRPC health service says SERVING."""
    if not await listens(address):
        return False
    async with open_channel(address, tls, role) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
    return response.status == health_pb2.HealthCheckResponse.SERVING


async def listens(address: str) -> bool:
    """Somebody takes connections there. A channel that finds nobody costs fifty times as much."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def startup_phases(address: str, tls: TlsFiles | None = None) -> dict[str, float]:
    """What a worker says of its start, name -> seconds; nothing if it does not say."""
    async with open_channel(address, tls, WORKER) as channel:
        try:
            info = await worker_pb2_grpc.WorkerServiceStub(channel).Info(worker_pb2.InfoRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return {}
    return {phase.name: phase.seconds for phase in info.startup}


def _any_certificate() -> ssl.SSLContext:
    """The address is our own: it need not prove who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def https_healthy(address: str) -> bool:
    return await http_healthy(address, _any_certificate())


async def https_answers(address: str) -> bool:
    """It speaks TLS; more is not to be had without a client's certificate."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=_any_certificate())
    except ssl.SSLError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def http_healthy(address: str, context: ssl.SSLContext | None = None) -> bool:
    """GET /health is answered 200."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
            try:
                writer.write(f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in status_line
