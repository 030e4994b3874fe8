"""Mutual TLS between services: who gets in, who may call what, and certificates that change while they are used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import certificates
import grpc
import psutil
import pytest
import structlog
from fakes import RedisServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire.v1 import (
    common_pb2,
    decode_pb2,
    inference_pb2,
    kv_channel_pb2,
    prefill_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from pagewire_bridge import client
from pagewire_core.errors import StartupError
from pagewire_core.redis_link import REDIS_ERRORS, open_redis, require_reachable
from pagewire_core.registry import Registration, list_workers
from pagewire_core.rpc import RpcServer, open_channel
from pagewire_core.tls import CALLERS, ROLES, TlsFiles, may_call, tls_files, with_certificates
from redis.asyncio import Redis
from scripted_router import ScriptedRouter, accepted, running_router, summary

MODULES = (common_pb2, decode_pb2, inference_pb2, kv_channel_pb2, prefill_pb2, worker_pb2)
CALL_S = 20.0


class Servicer(worker_pb2_grpc.WorkerServiceServicer):
    """Answers Info, and streams the numbers of a drain for ever."""

    async def Info(self, request: worker_pb2.InfoRequest, context: grpc.aio.ServicerContext) -> worker_pb2.InfoResponse:
        return worker_pb2.InfoResponse(worker_id="w")

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.DrainResponse]:
        while True:
            yield worker_pb2.DrainResponse(num_running=1)
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(tls: TlsFiles | None) -> AsyncIterator[str]:
    server = RpcServer(tls)
    service = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, Servicer(), service)
    port = await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def status_of_info(address: str, tls: TlsFiles | None, role: str = "worker") -> grpc.StatusCode:
    async with open_channel(address, tls, role) as channel:
        try:
            await worker_pb2_grpc.WorkerServiceStub(channel).Info(worker_pb2.InfoRequest(), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.made(tmp_path_factory.mktemp("ours") / "tls")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.made(tmp_path_factory.mktemp("foreign") / "tls")


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_call_what_the_table_says_and_nothing_else(ours: Path, role: str) -> None:
    async with serving(certificates.of(ours, "worker")) as address:
        allowed = role in CALLERS["/pagewire.v1.WorkerService"]
        expected = grpc.StatusCode.OK if allowed else grpc.StatusCode.PERMISSION_DENIED
        assert await status_of_info(address, certificates.of(ours, role)) is expected
        async with open_channel(address, certificates.of(ours, role)) as channel:
            drain = worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest(), timeout=CALL_S)
            if role == "operator":
                assert (await drain.read()).num_running == 1
            else:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await drain.read()
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
                assert f"{role}.pagewire.internal may not call" in (refused.value.details() or "")


async def test_strangers_do_not_get_as_far_as_a_call(ours: Path, foreign: Path) -> None:
    """Plain text, no certificate, another authority's, and one of ours by a client that trusts another."""
    worker = certificates.of(ours, "worker")
    async with serving(worker) as address:
        assert await status_of_info(address, None) is grpc.StatusCode.UNAVAILABLE
        assert await status_of_info(address, certificates.of(foreign, "router", ours)) is grpc.StatusCode.UNAVAILABLE
        assert await status_of_info(address, certificates.of(ours, "router", foreign)) is grpc.StatusCode.UNAVAILABLE
        anonymous = grpc.ssl_channel_credentials((ours / "ca.crt").read_bytes())
        options = [("grpc.ssl_target_name_override", "worker.pagewire.internal")]
        async with grpc.aio.secure_channel(address, anonymous, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await status_of_info(address, certificates.of(ours, "router")) is grpc.StatusCode.OK


async def test_a_client_speaks_only_to_the_role_it_expects(ours: Path) -> None:
    """A prompt must not go to whoever took the router's address."""
    async with serving(certificates.of(ours, "bridge")) as address:
        router = certificates.of(ours, "router")
        assert await status_of_info(address, router, "worker") is grpc.StatusCode.UNAVAILABLE
        assert await status_of_info(address, router, "bridge") is grpc.StatusCode.OK


async def test_a_plain_server_is_not_spoken_to_with_a_certificate(ours: Path) -> None:
    async with serving(None) as address:
        assert await status_of_info(address, certificates.of(ours, "router")) is grpc.StatusCode.UNAVAILABLE


async def test_certificates_are_replaced_under_traffic(tmp_path: Path) -> None:
    """Every call of many clients succeeds while all files are written anew, by the same authority and twice."""
    directory = certificates.made(tmp_path / "tls")
    serials: set[int] = set()
    async with serving(certificates.of(directory, "worker")) as address:
        host, _, port = address.partition(":")

        async def call_again_and_again(until: asyncio.Event) -> int:
            count = 0
            while not until.is_set():
                assert await status_of_info(address, certificates.of(directory, "router")) is grpc.StatusCode.OK
                count += 1
            return count

        async with open_channel(address, certificates.of(directory, "operator")) as channel:
            drain = worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest())
            done = asyncio.Event()
            callers = [asyncio.create_task(call_again_and_again(done)) for _ in range(3)]
            for _ in range(3):
                serials.add(await asyncio.to_thread(_serial_of, host, int(port), directory))
                await asyncio.sleep(0.05)
                certificates.made(directory)
            done.set()
            assert min(await asyncio.gather(*callers)) > 0
            assert (await drain.read()).num_running == 1  # a connection of before goes on
            drain.cancel()
    assert len(serials) == 3


def _serial_of(host: str, port: int, directory: Path) -> int:
    from cryptography import x509

    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "router.crt", directory / "router.key")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=CALL_S) as plain,
        context.wrap_socket(plain, server_hostname="worker.pagewire.internal") as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


async def test_a_new_authority_shuts_out_the_old_one(tmp_path: Path) -> None:
    directory, old = certificates.made(tmp_path / "tls"), tmp_path / "old"
    async with serving(certificates.of(directory, "worker")) as address:
        assert await status_of_info(address, certificates.of(directory, "router")) is grpc.StatusCode.OK
        directory.rename(old)
        certificates.made(directory)
        assert await status_of_info(address, certificates.of(old, "router", directory)) is grpc.StatusCode.UNAVAILABLE
        assert await status_of_info(address, certificates.of(directory, "router")) is grpc.StatusCode.OK


def test_files_that_are_half_replaced_are_not_used(tmp_path: Path) -> None:
    directory = certificates.made(tmp_path / "tls")
    files = certificates.of(directory, "worker")
    before = files.read()
    (directory / "worker.key").write_bytes((directory / "router.key").read_bytes())
    assert files.read() == before
    (directory / "worker.key").unlink()
    assert files.read() == before
    certificates.made(directory)
    assert files.read() != before


@pytest.mark.parametrize("spoiled", ["worker.crt", "worker.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"not PEM"])
def test_files_that_never_fitted_end_the_start_with_a_sentence(tmp_path: Path, spoiled: str, content: bytes) -> None:
    directory = certificates.made(tmp_path / "tls")
    (directory / spoiled).unlink() if content is None else (directory / spoiled).write_bytes(content)
    files = certificates.of(directory, "worker")
    with pytest.raises(StartupError, match="--tls-cert, --tls-key, --tls-ca: "):
        tls_files(files.cert, files.key, files.ca)


def test_the_three_flags_go_together() -> None:
    assert tls_files(None, None, None) is None
    with pytest.raises(StartupError, match="go together"):
        tls_files("a", None, "b")


def test_every_service_says_who_may_call_it() -> None:
    """A new service that nobody may call would be noticed only where TLS is on."""
    services = {f"/{s.full_name}" for m in MODULES for s in m.DESCRIPTOR.services_by_name.values()}
    methods = {f"/{s.full_name}/{name}" for m in MODULES for s in m.DESCRIPTOR.services_by_name.values()
               for name in s.methods_by_name}  # fmt: skip
    assert services <= CALLERS.keys() <= services | methods
    everybody = [f"{role}.pagewire.internal".encode() for role in ROLES]
    assert all(may_call(method, everybody) for method in methods)
    assert not may_call("/pagewire.v1.Unheard/Of", everybody)
    assert not may_call("/pagewire.v1.DecodeService/Decode", [b"router.pagewire.internal.evil.example", b"router"])


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", 0), ("0.0.0.0", 1)])
async def test_plain_text_on_an_open_address_is_said_loudly(host: str, told: int, ours: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        for tls in (None, certificates.of(ours, "worker")):
            server = RpcServer(tls)
            server.bind(host, 0)
            await server.serve()
            await server.stop(0)
    assert [line["event"].startswith("LISTENING IN PLAIN TEXT") for line in lines] == [True] * told


async def test_a_connection_that_says_nothing_is_sent_away(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default gRPC keeps it for two minutes, each with a descriptor."""
    from pagewire_core import rpc

    quick = [(k, 200 if k == "grpc.server_handshake_timeout_ms" else v) for k, v in rpc._SERVER_OPTIONS]
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", quick)
    async with serving(certificates.of(ours, "worker")) as address:
        host, _, port = address.partition(":")
        before = psutil.Process().num_fds()
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), CALL_S) == b""
            writer.close()
        deadline = time.monotonic() + CALL_S
        while psutil.Process().num_fds() > before:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def test_the_command_makes_certificates_that_only_their_owner_can_read(tmp_path: Path) -> None:
    directory = tmp_path / "tls"
    command = [str(Path(sys.executable).with_name("pagewire")), "certs", str(directory), "--hosts=box,10.0.0.7"]
    assert "operator" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {f"{name}.{kind}" for name in ("ca", *ROLES, "redis", "edge") for kind in ("crt", "key")}
    assert set(os.listdir(directory)) == names
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in names} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    authority, worker = (directory / "ca.key").read_bytes(), (directory / "worker.crt").read_bytes()
    subprocess.run(command, capture_output=True, check=True)
    assert (directory / "ca.key").read_bytes() == authority
    assert (directory / "worker.crt").read_bytes() != worker
    endless = subprocess.run([*command, "--days=100000000"], capture_output=True, text=True)
    assert endless.returncode == 1 and endless.stderr.count("\n") == 1
    (directory / "ca.key").write_bytes(b"")
    spoiled = subprocess.run(command, capture_output=True, text=True)
    assert spoiled.returncode == 1 and spoiled.stderr.startswith("pagewire: cannot make certificates in")


def test_a_redis_url_gets_our_certificates_unless_it_has_its_own() -> None:
    tls = TlsFiles("/c d", "/k", "/a")
    assert with_certificates("redis://h:1/0", tls) == "redis://h:1/0"
    assert with_certificates(None, tls) is None
    url = with_certificates("rediss://:p%40@h:1/0?ssl_ca_certs=/own", tls)
    assert url == "rediss://:p%40@h:1/0?ssl_certfile=%2Fc%20d&ssl_keyfile=%2Fk&ssl_ca_certs=%2Fown"


async def test_a_bridge_shows_its_new_certificate_when_it_connects_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that runs meanwhile goes on; a channel shows the certificate that it was made with for ever."""
    monkeypatch.setattr(client, "RENEW_S", 0.05)
    monkeypatch.setattr(client, "QUICK_S", 0.3)
    directory, release = certificates.made(tmp_path / "tls"), asyncio.Event()

    async def script(request: object) -> AsyncIterator[object]:
        yield accepted()
        await release.wait()
        yield summary()

    router = ScriptedRouter()
    router.script = script  # type: ignore[assignment]
    async with running_router(router, certificates.of(directory, "router")) as (_, address):
        bridge = client.RouterClient(address, 30, certificates.of(directory, "bridge"))
        stream = bridge.generate(inference_pb2.GenerateRequest(text="x"))
        assert (await anext(stream)).WhichOneof("event") == "accepted"
        first = bridge._link
        directory.rename(tmp_path / "old")
        certificates.made(directory)  # of another authority: the old certificate opens nothing any more
        async with asyncio.timeout(CALL_S):
            while bridge._link is first or not await bridge.is_serving():
                await asyncio.sleep(0.02)
        await asyncio.sleep(2 * client.QUICK_S)
        release.set()
        assert [event.WhichOneof("event") async for event in stream] == ["summary"]
        await bridge.close()


@contextlib.asynccontextmanager
async def tls_before(server: RedisServer, directory: Path) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """A rediss:// URL, and what is connected to it: TLS ends here, as the bundled server speaks none."""
    open_ends: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ends.append(writer)
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pass_on(reader, behind[1]), pass_on(behind[0], writer))

    def begin(context: ssl.SSLContext) -> ssl.SSLContext:
        context.load_cert_chain(directory / "redis.crt", directory / "redis.key")
        context.load_verify_locations(directory / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=begin(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    try:
        yield f"rediss://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0", open_ends
    finally:
        listener.close()
        for writer in open_ends:
            if not writer.is_closing():
                writer.transport.abort()


async def test_redis_over_tls_asks_for_our_certificate_and_takes_the_new_one(
    redis_server: RedisServer, tmp_path: Path, foreign: Path
) -> None:
    directory = certificates.made(tmp_path / "tls")
    async with tls_before(redis_server, directory) as (url, open_ends):
        worker = with_certificates(url, certificates.of(directory, "worker"))
        assert worker is not None
        await require_reachable(worker)
        for stranger in (url, with_certificates(url, certificates.of(foreign, "worker", directory))):
            with pytest.raises(StartupError, match="cannot reach Redis"):
                await require_reachable(str(stranger))
        fields = {"worker_id": "w", "instance": "i", "address": "127.0.0.1:1", "role": "decode"}
        registration = asyncio.create_task(Registration(worker, fields).run())
        direct = open_redis(redis_server.url)
        try:
            await _until_listed(direct)
            certificates.made(directory)  # of the same authority, and then Redis goes away for a moment
            for writer in open_ends:
                if not writer.is_closing():
                    writer.transport.abort()
            await direct.delete("pd:w", "pd:w:w")
            await _until_listed(direct)
        finally:
            registration.cancel()
            await asyncio.gather(registration, return_exceptions=True)
            await direct.aclose()


async def test_a_client_of_redis_that_connects_again_shows_the_new_certificate(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """A bridge has one for its whole life, and the first certificate ends."""
    directory = certificates.made(tmp_path / "tls")
    async with tls_before(redis_server, directory) as (url, open_ends):

        def shown() -> set[str]:
            found = [end.get_extra_info("peercert") for end in open_ends if not end.is_closing()]
            return {certificate["serialNumber"] for certificate in found if certificate}

        async with open_redis(str(with_certificates(url, certificates.of(directory, "bridge")))) as redis:
            await redis.ping()
            first = shown()
            certificates.made(directory)
            for end in open_ends:
                end.transport.abort()
            with contextlib.suppress(*REDIS_ERRORS):
                await redis.ping()
            await redis.ping()
            assert len(first) == len(shown()) == 1
            assert first != shown()


async def _until_listed(redis: Redis) -> None:
    async with asyncio.timeout(15):
        while [worker.worker_id for worker in await list_workers(redis)] != ["w"]:
            await asyncio.sleep(0.02)
