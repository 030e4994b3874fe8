"""The whole system with mutual TLS, and strangers at every port that any of its processes has open.

`test_security.py` has what an HTTP client meets who got as far as that.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import certificates
import grpc
import psutil
import pytest
import pytest_asyncio
from cluster import ANSWER_S, PAIRS, SMALL, Cluster, running
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from pagewire_core.rpc import MAX_MESSAGE_BYTES, open_channel
from pagewire_core.tls import CALLERS, ROLES, may_call, san
from strangers import (
    DATA,
    NOISE,
    all_methods,
    bent_calls,
    channel_of,
    grpc_processes,
    kinds,
    listening,
    of_strangers,
    outcome,
    say,
    services_of,
    unchecking,
)
from streams import prompt_of
from tiny_models import reference_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")

GARBAGE = b"\xff" * 40  # no message of any kind
# Refusals of a server that is well.
REFUSED = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT,
           grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    tls = certificates.made(tmp_path_factory.mktemp("ours") / "tls")
    directory = tmp_path_factory.mktemp("tls-cluster")
    flags = (*SMALL, "--lanes=tcp")  # auto would be shm here
    async with running(Cluster(llama, directory, worker_flags=flags, router_flags=PAIRS, tls=tls, https=True)) as it:
        yield it


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.made(tmp_path_factory.mktemp("foreign") / "tls")


async def check_tokens(cluster: Cluster, seed: int) -> None:
    prompt = prompt_of(70, seed)
    answer = await cluster.complete(prompt, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == reference_greedy(cluster.model, prompt, 12)[0]


def callers(cluster: Cluster) -> dict[str, int]:
    """How many have a connection to each process."""
    found = {}
    for name, process in cluster.processes.items():
        ports, connections = listening(process), psutil.Process(process.pid).net_connections("tcp")
        found[name] = sum(c.laddr.port in ports and c.status != psutil.CONN_LISTEN for c in connections)
    return found


async def test_tokens_are_those_of_the_reference_and_crossed_the_wire(cluster: Cluster) -> None:
    await asyncio.gather(*(check_tokens(cluster, seed) for seed in range(4)))
    totals = await cluster.metrics()
    assert totals["pagewire_kv_transfer_bytes_total{lane=tcp}"] == 2 * 4 * 70 * 384  # sent and received


@pytest_asyncio.fixture(loop_scope="module")
async def unharmed(cluster: Cluster) -> AsyncIterator[None]:
    """Whatever somebody did, the system answers as before, and holds nothing of him."""
    seeds = itertools.count(20)
    await check_tokens(cluster, next(seeds))
    before = callers(cluster)
    yield
    await check_tokens(cluster, next(seeds))
    await cluster.settle()

    async def as_before() -> bool:
        return all(now <= before[name] + 1 for name, now in callers(cluster).items())

    await cluster.until(as_before, f"connections of strangers are still held; before there were {before}", 30)


async def test_a_stranger_at_every_port_learns_nothing(cluster: Cluster, foreign: Path, unharmed: None) -> None:
    contexts = (None, unchecking(None), unchecking(certificates.of(foreign, "router")))
    ports = {name: listening(process) for name, process in cluster.processes.items()}
    assert not ports.pop("redis") and all(ports.values())
    bridge = ports.pop("bridge")  # speaks TLS to everybody: what it then says is in test_security.py
    answers = await asyncio.gather(*(say(port, words, None) for port in bridge for words in NOISE))
    for port in itertools.chain(*ports.values()):
        answers += await asyncio.gather(*(say(port, words, context) for words in NOISE for context in contexts))
    # A TLS alert (type 21) says only that the stranger is not welcome.
    assert all(not answer or answer[0] == 21 for answer in answers), answers


async def test_a_stranger_cannot_call_anything(cluster: Cluster, foreign: Path, unharmed: None) -> None:
    assert cluster.tls is not None
    methods = all_methods()
    assert len(methods) > 25 and "/grpc.health.v1.Health/Check" in methods
    for name, process in grpc_processes(cluster).items():
        for kind, files in of_strangers(cluster.tls, foreign).items():
            async with channel_of(process, files, "router" if name == "router" else "worker") as channel:
                codes = {method: await outcome(channel, method) for method in methods}
                assert set(codes.values()) == {grpc.StatusCode.UNAVAILABLE}, (name, kind, codes)


async def test_a_role_may_call_what_the_table_says_on_every_process(cluster: Cluster, unharmed: None) -> None:
    """Also whoever has a certificate of ours that names no role at all, such as the edge. What may be called is not."""
    assert cluster.tls is not None
    denied = dict[str, int]()
    for name, process in grpc_processes(cluster).items():
        for role in (*ROLES, "edge", "redis"):
            files = certificates.of(cluster.tls, role).read()
            async with channel_of(process, files, "router" if name == "router" else "worker") as channel:
                served = await services_of(channel)
                for method in (m for m in all_methods() if m.startswith("/pagewire.")):
                    if method.split("/")[1] not in served:
                        assert await outcome(channel, method) is grpc.StatusCode.UNIMPLEMENTED
                    elif not may_call(method, [san(role).encode()]):
                        assert await outcome(channel, method) is grpc.StatusCode.PERMISSION_DENIED, (name, role, method)
                        denied[method] = denied.get(method, 0) + 1
    assert {f"/{m.split('/')[1]}" for m in denied} == {m for m in CALLERS if m.count("/") == 1}, "somebody serves each"
    assert all(denied.get(m) for m in all_methods() if m.startswith("/pagewire."))


async def test_callers_who_may_call_and_send_nonsense_are_refused(cluster: Cluster, unharmed: None) -> None:
    """Bytes that are no message at every method; one that is too large; HTTP/2 that no client speaks."""
    assert cluster.tls is not None
    for name, process in grpc_processes(cluster).items():
        expected, port = "router" if name == "router" else "worker", listening(process)[0]
        for role in ROLES:
            files = certificates.of(cluster.tls, role)
            async with channel_of(process, files.read(), expected) as channel:
                served = await services_of(channel)
                mine = [m for m in all_methods() if m.split("/")[1] in served and may_call(m, [san(role).encode()])]
                for method in mine:
                    assert await outcome(channel, method, GARBAGE) in REFUSED, method
                if role == "operator":  # what comes before a message is the same for every role
                    large = await outcome(channel, mine[0], bytes(MAX_MESSAGE_BYTES + 1))
                    assert large is grpc.StatusCode.RESOURCE_EXHAUSTED
                    bent = [
                        say(port, words, unchecking(files), san(expected), first_s=10) for words in bent_calls(mine[0])
                    ]
                    answers = await asyncio.gather(*bent)
                    assert all(answers) and not [answer for answer in answers if DATA in kinds(answer)], answers


async def test_a_bridge_that_was_taken_over_reaches_the_router_alone(cluster: Cluster) -> None:
    """Of all services it is the one that strangers speak to."""
    assert cluster.tls is not None
    bridge = certificates.of(cluster.tls, "bridge")
    async with open_channel(cluster.processes["router"].address, bridge, "router") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=ANSWER_S)).models[0].ready


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
