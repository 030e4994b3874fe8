"""HTTPS at the edge: vLLM's flags, clients with certificates, and a certificate that changes while it is used."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import certificates
import httpx
import pytest
from cryptography import x509
from pagewire_bridge.app import create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.https import HttpsFiles, https_files
from pagewire_bridge.main import build_server, listen
from pagewire_cli import readiness
from pagewire_core.errors import StartupError
from scripted_router import ScriptedRouter, running_router


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return certificates.made(tmp_path / "tls")


@contextlib.asynccontextmanager
async def running(files: HttpsFiles) -> AsyncIterator[str]:
    """Address of a bridge."""
    async with running_router(ScriptedRouter()) as (_, router):
        listener = listen("127.0.0.1", 0)
        server = build_server(create_app(lambda: RouterClient(router, 30)), https=files)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


def edge(directory: Path, cert_reqs: int = 0) -> HttpsFiles:
    ca = str(directory / "ca.crt") if cert_reqs else None
    files = https_files(str(directory / "edge.key"), str(directory / "edge.crt"), ca, cert_reqs)
    assert files is not None
    return files


def client(directory: Path, shown: str | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    if shown:
        context.load_cert_chain(directory / f"{shown}.crt", directory / f"{shown}.key")
    return httpx.AsyncClient(verify=context, trust_env=False)


async def test_the_image_with_everything_is_well_with_certificates_too(directory: Path) -> None:
    """They are in the arguments that it is given, of which its probe knows nothing."""
    text = (Path(__file__).parents[2] / "Dockerfile").read_text().rpartition(" AS pagewire\n")[2]
    [probe] = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", text, re.M)
    async with running(edge(directory)) as address:
        health = f"{sys.executable} -Pc 'from pagewire_cli.health import main; main()'"
        command = probe.replace("127.0.0.1:11434", address).replace("pagewire-health", health)
        process = await asyncio.create_subprocess_shell(command, stderr=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0


async def test_a_bridge_that_stops_does_not_wait_for_idle_clients(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They read nothing between two requests, nor the goodbye of TLS: a stop took all of its ten seconds."""
    async with client(directory) as http, running(edge(directory)) as address:
        assert (await http.get(f"https://{address}/version")).status_code == 200
    assert "graceful shutdown exceeded" not in caplog.text


async def test_a_client_that_knows_the_authority_is_answered_and_plain_text_is_not(directory: Path) -> None:
    async with running(edge(directory)) as address, client(directory) as http:
        response = await http.post(f"https://{address}/v1/completions", json={"prompt": "hi"})
        assert response.status_code == 200 and response.json()["choices"]
        assert await readiness.https_healthy(address) and await readiness.https_answers(address)
        assert not await readiness.http_healthy(address)
        async with httpx.AsyncClient(trust_env=False) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get(f"http://{address}/version")
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await plain.get(f"https://{address}/version")


async def test_clients_without_a_certificate_are_refused_where_one_is_required(directory: Path) -> None:
    async with running(edge(directory, ssl.CERT_REQUIRED)) as address:
        async with client(directory, "client") as named:
            assert (await named.get(f"https://{address}/version")).status_code == 200
        async with client(directory) as anonymous:
            with pytest.raises(httpx.TransportError):
                await anonymous.get(f"https://{address}/version")
        assert await readiness.https_answers(address)


async def test_a_certificate_is_replaced_without_a_restart(directory: Path) -> None:
    """Half-way through, when the key is another's, the old pair goes on."""

    async def shown() -> int:
        host, _, port = address.partition(":")
        context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(der).serial_number

    def on_disk() -> int:
        return x509.load_pem_x509_certificate((directory / "edge.crt").read_bytes()).serial_number

    async with running(edge(directory)) as address, client(directory) as kept:
        assert (await kept.get(f"https://{address}/version")).status_code == 200
        first = on_disk()
        assert await shown() == first
        (directory / "edge.key").write_bytes((directory / "redis.key").read_bytes())
        assert await shown() == first
        certificates.made(directory)
        assert await shown() == on_disk() != first
        assert (await kept.get(f"https://{address}/version")).status_code == 200  # the connection of before


@pytest.mark.parametrize(
    ("key", "cert", "ca", "reqs", "sentence"),
    [
        ("k", None, None, 0, "go together"),
        (None, "c", None, 0, "go together"),
        (None, None, "a", 0, "need --ssl-certfile"),
        (None, None, None, 2, "need --ssl-certfile"),
        ("k", "c", None, 2, "needs --ssl-ca-certs"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    key: str | None, cert: str | None, ca: str | None, reqs: int, sentence: str
) -> None:
    with pytest.raises(StartupError, match=sentence):
        https_files(key, cert, ca, reqs)


def test_files_that_cannot_be_used_are_one_sentence(directory: Path) -> None:
    assert https_files(None, None, None, 0) is None
    for spoiled in (directory / "edge.crt", directory / "edge.key"):
        spoiled.write_bytes(b"no PEM")
        with pytest.raises(StartupError, match="--ssl-keyfile, --ssl-certfile"):
            edge(directory).server_context()
