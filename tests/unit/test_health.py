"""`pagewire-health`: what a container's probe learns from an exit code."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import certificates
import pytest
from pagewire_cli import health, ports
from pagewire_core.announced_host import address_of, announced_host
from pagewire_core.errors import StartupError
from pagewire_core.rpc import RpcServer


async def exit_code(*arguments: str) -> int:
    try:
        await asyncio.to_thread(health.main, [*arguments, "--timeout=3"], {})
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


async def test_a_worker_that_drains_is_alive_and_not_ready(tmp_path: Path) -> None:
    tls = certificates.made(tmp_path / "tls")
    server = RpcServer(certificates.of(tls, "worker"))
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    own = certificates.flags(tls, "worker")
    try:
        for serving in (True, False):
            await server.set_serving(serving)
            assert await exit_code("worker", address, *own) == (0 if serving else 1)
            assert await exit_code("worker", address, "--live", *own) == 0
        assert await exit_code("router", address, *own) == 1, "it is not a router"
        assert await exit_code("worker", address, "--live") == 1, "a stranger learns nothing"
    finally:
        await server.stop()


@pytest.mark.parametrize(("status", "ready"), [(200, 0), (503, 1)])
async def test_a_bridge_without_workers_is_alive_and_not_ready(status: int, ready: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await exit_code("bridge", address) == ready
        assert await exit_code("bridge", f"http://{address}", "--live") == 0


@pytest.mark.parametrize("host", ["::", "::1", "[::1]"])
async def test_a_service_may_listen_on_an_address_of_ipv6(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = RpcServer()
    port = await server.start(host, 0)
    try:
        await server.set_serving(True)
        assert await exit_code("worker", address_of(announced_host(host, "redis://[::1]/0"), port)) == 0
    finally:
        await server.stop()


async def test_a_proxy_for_the_outside_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services do not go through it to each other either."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = RpcServer()
    port = await server.start("127.0.0.1", 0)
    try:
        await server.set_serving(True)
        assert await exit_code("worker", f"127.0.0.1:{port}") == 0
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "arguments",
    [
        ("bridge", "127.0.0.1:x"),
        ("bridge", "https://127.0.0.1:1", "--tls-cert=/none", "--tls-key=/none"),
        ("worker", "127.0.0.1:1", "--tls-cert=/none", "--tls-key=/none", "--tls-ca=/none"),
    ],
)
async def test_what_cannot_be_asked_is_one_sentence(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await exit_code(*arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("pagewire-health: ") and said.count("\n") == 1


async def test_where_nobody_listens_nobody_is_alive() -> None:
    (port,) = ports.free_ports(1)
    for service in ("worker", "bridge"):
        assert await exit_code(service, f"127.0.0.1:{port}", "--live") == 1


def test_a_service_on_all_addresses_announces_the_one_towards_redis() -> None:
    assert announced_host("10.1.2.3", None) == "10.1.2.3"
    assert announced_host("worker.example", "redis://elsewhere") == "worker.example"
    assert announced_host("0.0.0.0", "redis://127.0.0.1:1234/0") == "127.0.0.1"
    assert announced_host("::", "redis://[::1]/0") == announced_host("[::1]", None) == "::1"
    for url in (None, "unix:///tmp/redis.sock"):
        with pytest.raises(StartupError, match="give the one that they are to use"):
            announced_host("0.0.0.0", url)


def test_probes_cost_little() -> None:
    """They run all the time: neither torch nor Redis nor our own logging may come along."""
    code = "import pagewire_cli.health, sys; print(*{'grpc', 'redis', 'structlog', 'ssl'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
