"""Those who have no business at a port, and what they say there: words of no protocol, bent HTTP/2 and HTTP, calls."""

from __future__ import annotations

import asyncio
import pkgutil
import random
import ssl
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import certificates
import grpc
import pagewire.v1
import psutil
from cluster import Cluster
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pagewire_core.tls import TlsFiles, san
from processes import Process

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Of no protocol that any port speaks to a stranger.
NOISE = (
    b"",
    b"\r\n" * 50,
    b"GET /metrics HTTP/1.0\r\n\r\n",
    PREFACE + bytes(64),
    random.Random(0).randbytes(3000),
    b"\x16\x03\x01\xff\xff" * 99,  # a record of TLS that never ends
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20),  # a greeting of TLS that is cut
    b"*1\r\n$4\r\nPING\r\n",
)
LISTEN_S = 0.3  # for an answer that is not to come


# ---------------------------------------------------------------- raw bytes


async def say(
    port: int, words: bytes, context: ssl.SSLContext | None, name: str = "localhost", limit_s: float = LISTEN_S,
    first_s: float = 0.0,
) -> bytes:  # fmt: skip
    """What a port answers until it closes, or within `limit_s`; nothing if there is no handshake.

    first_s: how much longer the beginning of an answer may take that is to come.
    """
    answer = b""
    try:
        shown = name if context else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=shown)
    except (OSError, ssl.SSLError):
        return answer
    try:
        writer.write(words)
        if first_s:
            async with asyncio.timeout(first_s):
                answer = await reader.read(1 << 16)
        async with asyncio.timeout(limit_s):
            while more := await reader.read(1 << 16):
                answer += more
    except (OSError, ssl.SSLError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return answer


def unchecking(files: TlsFiles | None, protocol: str = "h2") -> ssl.SSLContext:
    """Of a caller that shows these files, if any, and does not care who answers."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    if files:
        context.load_cert_chain(files.cert, files.key)
    return context


def listening(process: Process) -> list[int]:
    connections = psutil.Process(process.pid).net_connections("tcp")
    return sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN})


# ---------------------------------------------------------------- HTTP/2, by hand


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    return (
        (len(payload) if length is None else length).to_bytes(3, "big")
        + bytes((kind, flags))
        + stream.to_bytes(4, "big")
        + payload
    )


DATA, HEADERS, RESET, SETTINGS, CONTINUATION = 0, 1, 3, 4, 9
END_STREAM, END_HEADERS = 1, 4


def call_head(method: str) -> bytes:
    """HPACK of the head of a gRPC call, with nothing indexed or compressed."""
    fields = {":method": "POST", ":scheme": "https", ":path": method, ":authority": "x", "te": "trailers",
              "content-type": "application/grpc"}  # fmt: skip
    text = lambda value: bytes([len(value)]) + value.encode()  # noqa: E731
    return b"".join(b"\0" + text(name) + text(value) for name, value in fields.items())


def bent_calls(method: str) -> Iterator[bytes]:
    """What a client of HTTP/2 and gRPC never says."""
    begin, head = PREFACE + frame(SETTINGS, 0, 0, b""), call_head(method)
    call = begin + frame(HEADERS, END_HEADERS, 1, head)
    prefixed = lambda length, flag=0: bytes([flag]) + length.to_bytes(4, "big")  # noqa: E731
    yield begin + frame(HEADERS, END_HEADERS, 1, head, (1 << 24) - 1)  # longer than any frame may be
    yield begin + frame(HEADERS, END_HEADERS, 1, head[: len(head) // 2])
    yield begin + frame(HEADERS, END_HEADERS, 1, b"\xff" * 40)  # indices that are not there
    yield begin + frame(HEADERS, 0, 1, head) + frame(CONTINUATION, 0, 1, b"\0\1a\1b" * 100) * 400  # a head without end
    yield begin + b"".join(
        frame(HEADERS, END_HEADERS, s, head) + frame(RESET, 0, s, bytes(4)) for s in range(1, 2001, 2)
    )
    yield begin + frame(DATA, 0, 0, b"x")
    yield begin + frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff")  # a window beyond the limit
    yield begin + frame(0xEE, 0, 1, b"?") + frame(DATA, END_STREAM, 7, b"x")
    yield call + frame(DATA, END_STREAM, 1, prefixed(0xFFFF_FFFF) + b"x")
    yield call + frame(DATA, END_STREAM, 1, prefixed(100) + b"cut")
    yield call + frame(DATA, END_STREAM, 1, prefixed(3, 1) + b"\1\2\3")  # said to be compressed
    yield call + frame(DATA, END_STREAM, 1, b"\0\0")


def kinds(answer: bytes) -> list[int]:
    """Of the frames in it."""
    found = []
    while len(answer) >= 9:
        found.append(answer[3])
        answer = answer[9 + int.from_bytes(answer[:3], "big") :]
    return found


# ---------------------------------------------------------------- calls


def all_methods() -> list[str]:
    """`/package.Service/Method` of every service of ours and of those beside them, whichever process has it."""
    ours = [import_module(f"pagewire.v1.{m.name}") for m in pkgutil.iter_modules(pagewire.v1.__path__)]
    files = [m.DESCRIPTOR for m in (*ours, health_pb2, reflection_pb2) if hasattr(m, "DESCRIPTOR")]
    return sorted({f"/{service.full_name}/{name}" for file in files for service in file.services_by_name.values()
                   for name in service.methods_by_name})  # fmt: skip


def channel_of(process: Process, files: Sequence[bytes | None] | None, expected: str) -> grpc.aio.Channel:
    """files: certificate, key and authority, any of which may be missing; None: in plain text."""
    if files is None:
        return grpc.aio.insecure_channel(process.address)
    cert, key, ca = files
    options = [("grpc.ssl_target_name_override", san(expected))]
    return grpc.aio.secure_channel(process.address, grpc.ssl_channel_credentials(ca, key, cert), options)


async def outcome(channel: grpc.aio.Channel, method: str, message: bytes = b"", limit_s: float = 20) -> grpc.StatusCode:
    """Of a call with this one message, whatever kind of call the method is."""
    call = channel.unary_stream(method)(message, timeout=limit_s)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()


async def services_of(channel: grpc.aio.Channel) -> set[str]:
    """What a server says that it has."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=5)
    [answer] = [answer async for answer in answers]
    return {service.name for service in answer.list_services_response.service}


def of_strangers(ours: Path, foreign: Path) -> dict[str, Sequence[bytes | None] | None]:
    """For `channel_of`: those who have no certificate of our authority."""
    ca = (ours / "ca.crt").read_bytes()
    return {
        "plain text": None,
        "no certificate": (None, None, ca),
        "another authority's": (*certificates.of(foreign, "operator").read()[:2], ca),
        "another authority's, and trusts it": certificates.of(foreign, "operator").read(),
    }


def grpc_processes(cluster: Cluster) -> dict[str, Process]:
    return {name: p for name, p in cluster.processes.items() if p.role in ("router", "prefill", "decode", "both")}
