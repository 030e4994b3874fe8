from __future__ import annotations

import asyncio

import pytest
from pagewire_cli import ports, readiness
from pagewire_core.errors import StartupError
from pagewire_core.rpc import RpcServer


async def test_a_grpc_service_is_ready_only_when_it_says_serving() -> None:
    server = RpcServer()
    port = await server.start("127.0.0.1", 0)
    try:
        await server.set_serving(False)
        assert not await readiness.grpc_serves(f"127.0.0.1:{port}")
        await server.set_serving(True)
        assert await readiness.grpc_serves(f"127.0.0.1:{port}")
    finally:
        await server.stop()
    assert not await readiness.grpc_serves(f"127.0.0.1:{port}")


@pytest.mark.parametrize(("status", "ready"), [("200 OK", True), ("503 Service Unavailable", False), ("", False)])
async def test_an_http_service_is_ready_only_when_its_health_is_200(status: str, ready: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode() if status else b"")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await readiness.http_healthy(f"127.0.0.1:{port}") is ready


async def test_a_port_that_nobody_listens_on_is_not_ready() -> None:
    (port,) = ports.free_ports(1)
    assert not await readiness.http_healthy(f"127.0.0.1:{port}")
    assert not await readiness.redis_answers(f"127.0.0.1:{port}")


def test_free_ports_are_distinct_and_free() -> None:
    chosen = ports.free_ports(20)
    assert len(set(chosen)) == 20
    assert all(ports.is_free("127.0.0.1", port) for port in chosen)


def test_an_address_of_another_machine_is_refused_in_one_sentence() -> None:
    with pytest.raises(StartupError, match="choose another --host"):
        ports.require_free("203.0.113.1", 8000)
    with pytest.raises(StartupError, match="choose another --host"):
        ports.require_free("no-such-host.invalid", 8000)
