"""The whole system with mutual TLS, and strangers at every port that any of its processes has open."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import certificates
import grpc
import psutil
import pytest
import pytest_asyncio
from cluster import PAIRS, SMALL, Cluster, running
from pagewire.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from pagewire_core.rpc import open_channel
from streams import prompt_of
from tiny_models import reference_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SAID = (
    b"",
    b"\r\n" * 50,
    b"GET /metrics HTTP/1.0\r\n\r\n",
    HTTP2 + bytes(64),
    random.Random(0).randbytes(3000),
    b"\x16\x03\x01\xff\xff" * 99,
)
SECRET_S = 0.3  # how long a stranger listens for an answer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    tls = certificates.made(tmp_path_factory.mktemp("ours") / "tls")
    directory = tmp_path_factory.mktemp("tls-cluster")
    flags = (*SMALL, "--lanes=tcp")  # auto would be shm here
    async with running(Cluster(llama, directory, worker_flags=flags, router_flags=PAIRS, tls=tls)) as it:
        yield it


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.made(tmp_path_factory.mktemp("foreign") / "tls")


async def check_tokens(cluster: Cluster, seed: int) -> None:
    prompt = prompt_of(70, seed)
    answer = await cluster.complete(prompt, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == reference_greedy(cluster.model, prompt, 12)[0]


def open_ports(cluster: Cluster) -> dict[str, list[int]]:
    """By process; of those that are to be safe without a network of their own."""
    names = [name for name, process in cluster.processes.items() if process.alive and name not in ("redis", "bridge")]
    found = {}
    for name in names:
        connections = psutil.Process(cluster.processes[name].pid).net_connections("tcp")
        found[name] = sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN})
    assert all(found.values())
    return found


def descriptors(cluster: Cluster) -> dict[str, int]:
    return {name: psutil.Process(p.pid).num_fds() for name, p in cluster.processes.items() if p.alive}


async def test_tokens_are_those_of_the_reference_and_crossed_the_wire(cluster: Cluster) -> None:
    await asyncio.gather(*(check_tokens(cluster, seed) for seed in range(4)))
    totals = await cluster.metrics()
    assert totals["pagewire_kv_transfer_bytes_total{lane=tcp}"] == 2 * 4 * 70 * 384  # sent and received


async def _say(port: int, words: bytes, context: ssl.SSLContext | None) -> bytes:
    """What a port answers to a stranger."""
    try:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="worker.pagewire.internal" if context else None
        )
    except (OSError, ssl.SSLError):
        return b""
    try:
        writer.write(words)
        async with asyncio.timeout(SECRET_S):
            return await reader.read(1 << 16)
    except (OSError, ssl.SSLError, TimeoutError):
        return b""
    finally:
        writer.transport.abort()


def _contexts(foreign: Path) -> list[ssl.SSLContext | None]:
    anonymous, named = ssl.create_default_context(), ssl.create_default_context()
    named.load_cert_chain(foreign / "router.crt", foreign / "router.key")
    for context in (anonymous, named):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
    return [None, anonymous, named]


async def test_a_stranger_at_every_port_learns_nothing_and_changes_nothing(cluster: Cluster, foreign: Path) -> None:
    await check_tokens(cluster, 20)
    before = descriptors(cluster)
    for ports in open_ports(cluster).values():
        for port in ports:
            answers = await asyncio.gather(
                *(_say(port, words, context) for words in SAID for context in _contexts(foreign))
            )
            # A TLS alert (type 21) says only that the stranger is not welcome.
            assert all(not answer or answer[0] == 21 for answer in answers), answers
    await check_tokens(cluster, 21)
    await cluster.settle()

    async def as_before() -> bool:
        return all(now <= before[name] + 2 for name, now in descriptors(cluster).items())

    await cluster.until(as_before, "descriptors of strangers are still held", 15)


async def test_a_stranger_cannot_call_anything(cluster: Cluster, foreign: Path) -> None:
    for name in ("router", "prefill-0", "decode-0"):
        for tls in (None, certificates.of(foreign, "operator"), certificates.of(foreign, "operator", cluster.tls)):
            async with open_channel(cluster.processes[name].address, tls) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await worker_pb2_grpc.WorkerServiceStub(channel).Info(worker_pb2.InfoRequest(), timeout=5)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_bridge_that_was_taken_over_reaches_no_worker(cluster: Cluster) -> None:
    """Of all services it is the one that strangers speak to."""
    assert cluster.tls is not None
    bridge = certificates.of(cluster.tls, "bridge")
    async with open_channel(cluster.processes["decode-0"].address, bridge) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker_pb2_grpc.WorkerServiceStub(channel).Info(worker_pb2.InfoRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with open_channel(cluster.processes["router"].address, bridge, "router") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)).models[0].ready


async def test_certificates_are_replaced_while_streams_run(cluster: Cluster) -> None:
    assert cluster.tls is not None
    asking = [asyncio.create_task(check_tokens(cluster, 40 + i)) for i in range(4)]
    certificates.made(cluster.tls)
    await asyncio.gather(*asking)
    added = cluster.add_worker("decode")  # speaks to all others anew
    await cluster.wait_serving(added)
    await cluster.wait_workers(3)
    await asyncio.gather(*(check_tokens(cluster, 50 + i) for i in range(6)))
    assert '"decode done"' in added.log.read_text()
    assert os.path.exists(cluster.tls / "ca.key")
