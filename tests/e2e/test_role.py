"""Workers that change their role while requests run: clients notice nothing, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import leaks
import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from pagewire.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from pagewire_core.rpc import open_channel
from processes import Process, script
from streams import after, prompt_of, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=16", "--threads=1")
STREAMS = 6
PREFILL, DECODE, BOTH = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("role")
    made = Cluster(llama, directory, prefill=2, decode=2, worker_flags=SLOW, router_flags=PAIRS)
    async with running(made) as it:
        yield it


async def set_role(worker: Process, role: int, timeout_s: float = 0.0) -> list[int]:
    """How much was running of what it gave up, until nothing was."""
    async with open_channel(worker.address) as channel:
        request = worker_pb2.SetRoleRequest(role=role, timeout_s=timeout_s)
        return [r.num_running async for r in worker_pb2_grpc.WorkerServiceStub(channel).SetRole(request)]


async def wait_roles(cluster: Cluster, **roles: int) -> None:
    """Until the router knows these roles, by name of the worker with _ for -."""

    async def known() -> bool:
        found = {w.address: w.role for w in (await cluster.status()).workers}
        return all(found[cluster.processes[name.replace("_", "-")].address] == role for name, role in roles.items())

    await cluster.until(known, f"the router does not know {roles}")


async def ask(cluster: Cluster, seed: int, max_tokens: int = 20) -> tuple[list[int], str, str]:
    """Tokens, and who served: the addresses of the prefill and the decode worker."""
    body = {"prompt": prompt_of(100, seed), "temperature": 0, "max_tokens": max_tokens, "return_token_ids": True}
    response = await cluster.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    served = (response.headers.get(f"x-pagewire-{leg}-worker", "").rpartition("-")[2] for leg in ("prefill", "decode"))
    return (response.json()["choices"][0]["token_ids"], *served)  # type: ignore[return-value]


async def test_workers_swap_their_roles_without_being_started_again(cluster: Cluster) -> None:
    before = [(await ask(cluster, seed))[0] for seed in range(4)]
    pids = {name: process.pid for name, process in cluster.processes.items()}
    swapped = {"prefill_0": DECODE, "prefill_1": DECODE, "decode_0": PREFILL, "decode_1": PREFILL}
    for name in ("decode-0", "prefill-0", "decode-1", "prefill-1"):  # somebody can decode all the time
        role = PREFILL if name.startswith("decode") else DECODE
        assert (await set_role(cluster.processes[name], role))[-1] == 0
    await wait_roles(cluster, **swapped)
    metrics = (await cluster.http.get("/metrics")).text
    for name, role in (("decode-0", "prefill"), ("prefill-0", "decode")):
        worker = f"{name.partition('-')[0]}-{cluster.processes[name].address}"
        assert f'pagewire_worker_info{{instance="{worker}",role="{role}"}} 1.0' in metrics
    decoding = {cluster.processes[name].address for name in ("prefill-0", "prefill-1")}
    computing = {cluster.processes[name].address for name in ("decode-0", "decode-1")}
    for seed, tokens in enumerate(before):
        now, prefill, decode = await ask(cluster, seed)
        assert decode in decoding and prefill in computing | {""}
        assert now == tokens
    assert (await ask(cluster, 50))[1] in computing, "nobody has this prompt: it goes through a prefill worker"
    assert {name: process.pid for name, process in cluster.processes.items()} == pids
    for name in ("decode-0", "prefill-0", "decode-1", "prefill-1"):
        await set_role(cluster.processes[name], DECODE if name.startswith("decode") else PREFILL)
    await wait_roles(cluster, prefill_0=PREFILL, prefill_1=PREFILL, decode_0=DECODE, decode_1=DECODE)
    await cluster.settle()


async def test_a_prefill_worker_serves_one_token_and_hands_nothing_over_for_it(cluster: Cluster) -> None:
    before = (await cluster.metrics())["pagewire_kv_transfer_bytes_total"]
    computing = {cluster.processes[name].address for name in ("prefill-0", "prefill-1")}
    decoding = {cluster.processes[name].address for name in ("decode-0", "decode-1")}
    for seed in range(100, 104):
        [token], prefill, alone = await ask(cluster, seed, max_tokens=1)
        assert (prefill, alone in computing) == ("", True)
        assert (await cluster.metrics())["pagewire_kv_transfer_bytes_total"] == before
        tokens, prefill, decode = await ask(cluster, seed)
        assert tokens[0] == token
        assert prefill in computing
        assert decode in decoding
        before = (await cluster.metrics())["pagewire_kv_transfer_bytes_total"]
    await cluster.settle()


async def test_switching_to_and_fro_under_traffic_changes_no_token_and_leaves_nothing(cluster: Cluster) -> None:
    """Every flip once left a thread and a connection behind, until the process had no descriptors left."""
    flipping = [cluster.processes["prefill-1"], cluster.processes["decode-1"]]
    expected = await asyncio.gather(*(stream(cluster, i, max_tokens=120) for i in range(STREAMS)))
    for worker, roles in zip(flipping, ((DECODE, PREFILL), (PREFILL, DECODE)), strict=True):
        for role in roles:
            await set_role(worker, role)
    await asyncio.gather(*(stream(cluster, i, max_tokens=120) for i in range(STREAMS)))
    await cluster.settle()
    resumed = (await cluster.metrics())["pagewire_resumed_requests_total"]
    held = {worker.name: leaks.resources(worker) for worker in cluster.workers}

    async def flip() -> None:
        for number in range(20):  # and no more: streams that are handed over all the time get nowhere
            for worker, roles in zip(flipping, ((DECODE, PREFILL), (PREFILL, DECODE)), strict=True):
                assert (await set_role(worker, roles[number % 2], timeout_s=0.05 * (number % 3)))[-1] == 0
            await asyncio.sleep(0.05)

    flowing = asyncio.Event()
    arrived = after(STREAMS, flowing.set)
    asking = [asyncio.create_task(stream(cluster, i, arrived, max_tokens=120)) for i in range(STREAMS)]
    await flowing.wait()
    switching = asyncio.create_task(flip())
    assert await asyncio.gather(*asking) == expected
    while not switching.done():
        assert await asyncio.gather(*(stream(cluster, i, max_tokens=120) for i in range(STREAMS))) == expected
    await switching
    await wait_roles(cluster, prefill_1=PREFILL, decode_1=DECODE)
    assert (await cluster.metrics())["pagewire_resumed_requests_total"] > resumed, "nothing was handed over"
    await cluster.settle()

    async def no_more_than_before() -> bool:
        """What was given up is closed a moment after the last stream's end."""
        for worker in cluster.workers:
            now, most = leaks.resources(worker), held[worker.name]
            if now.threads > most.threads + 2 or now.descriptors > most.descriptors + 6:
                return False
            if now.lane_maps >= len(cluster.workers):  # one for each of the others
                return False
        return True

    await cluster.until(no_more_than_before, f"more is held than before: {held}")


async def test_what_still_runs_has_time_to_end_where_it_is(cluster: Cluster) -> None:
    flowing = [asyncio.Event() for _ in range(STREAMS)]
    retried = (await cluster.metrics()).get("pagewire_retries_total", 0.0)
    asking = [asyncio.create_task(stream(cluster, i, event.set, max_tokens=150)) for i, event in enumerate(flowing)]
    await asyncio.gather(*(event.wait() for event in flowing))
    left = (
        await set_role(cluster.processes["decode-0"], BOTH),
        await set_role(cluster.processes["decode-1"], PREFILL, 60),
    )
    assert left[0] == [0] and left[1][-1] == 0
    await asyncio.gather(*asking)
    assert (await cluster.metrics()).get("pagewire_retries_total", 0.0) == retried
    await set_role(cluster.processes["decode-0"], DECODE)
    await set_role(cluster.processes["decode-1"], DECODE)
    await wait_roles(cluster, decode_0=DECODE, decode_1=DECODE)


async def test_the_command_gives_a_role_or_says_why_not(cluster: Cluster) -> None:
    async def say(*arguments: str) -> tuple[int | None, str, str]:
        pipe = asyncio.subprocess.PIPE
        running = await asyncio.create_subprocess_exec(
            *script("pagewire"), "role", *arguments, stdout=pipe, stderr=pipe
        )
        output, errors = await running.communicate()
        return running.returncode, output.decode(), errors.decode()

    address = cluster.processes["prefill-0"].address
    assert await say(address, "both", "--timeout=0") == (0, f"{address} has role both\n", "")
    await wait_roles(cluster, prefill_0=BOTH)
    assert (await say(address, "prefill", "--timeout=0"))[0] == 0
    code, _, errors = await say("127.0.0.1:1", "both")
    assert code == 1 and errors.startswith("pagewire: 127.0.0.1:1 did not take the role: ")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_role(cluster.processes["prefill-0"], common_pb2.WORKER_ROLE_UNSPECIFIED)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
