"""A worker that is emptied, or told to stop, in mid-stream: its clients notice nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cluster import Cluster, Process, running, script
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from pagewire_cli.readiness import grpc_serves
from pagewire_core.rpc import open_channel
from streams import after, stream

SLOW = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=8", "--threads=1")
STREAMS = 10

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    flags = (*SLOW, "--graceful-termination-timeout=0")
    directory = tmp_path_factory.mktemp("drain")
    async with running(Cluster(llama, directory, prefill=2, decode=2, worker_flags=flags, with_faults=True)) as it:
        yield it


async def drain(worker: Process, timeout_s: float) -> list[int]:
    """How much was running, until nothing was."""
    async with open_channel(worker.address) as channel:
        request = worker_pb2.DrainRequest(timeout_s=timeout_s)
        return [r.num_running async for r in worker_pb2_grpc.WorkerServiceStub(channel).Drain(request)]


async def busiest(cluster: Cluster) -> Process:
    """The decode worker that has most to do."""

    async def num_running(worker: Process) -> int:
        async with open_channel(worker.address) as channel:
            report = await anext(aiter(worker_pb2_grpc.WorkerServiceStub(channel).Stats(worker_pb2.StatsRequest())))
        return report.num_running

    workers = [p for p in cluster.processes.values() if p.name.startswith("decode") and p.alive]
    running = await asyncio.gather(*map(num_running, workers))
    return workers[running.index(max(running))]


async def handed_over(cluster: Cluster) -> float:
    """How often a request had to go on on another decode worker."""
    return (await cluster.metrics()).get("pagewire_retries_total{leg=decode}", 0.0)


Told = dict[int, list[object]]


async def all_streams(cluster: Cluster, then: asyncio.Event, lines: int = STREAMS * 5) -> list[Told]:
    """Sets `then` when so many lines have come; by default when some streams are in full flow."""
    flowing = after(lines, then.set)
    return await asyncio.gather(*(stream(cluster, i, flowing, max_tokens=350) for i in range(STREAMS)))


@pytest.mark.parametrize(("role", "lines"), [("decode", STREAMS * 5), ("prefill", 1)])
async def test_a_worker_that_is_drained_hands_over_what_runs_on_it(cluster: Cluster, role: str, lines: int) -> None:
    expected = await all_streams(cluster, asyncio.Event())
    before, flowing = await handed_over(cluster), asyncio.Event()
    with cluster.slow_steps():
        asking = asyncio.create_task(all_streams(cluster, flowing, lines))
        await flowing.wait()
        worker = await busiest(cluster) if role == "decode" else cluster.processes["prefill-0"]
        assert (await drain(worker, 0))[-1] == 0
    assert await asking == expected
    if role == "decode":
        assert await handed_over(cluster) > before
    assert worker.alive
    async with open_channel(worker.address) as channel:
        report = await anext(aiter(worker_pb2_grpc.WorkerServiceStub(channel).Stats(worker_pb2.StatsRequest())))
    assert report.draining and not report.num_running and report.free_blocks == report.total_blocks
    assert not await grpc_serves(worker.address), "probes think that it takes requests"
    assert await asyncio.to_thread(worker.stop) == 0
    added = cluster.add_worker(role)
    await cluster.wait_serving(added)
    await cluster.wait_workers(4)


async def test_a_worker_that_is_told_to_stop_hands_over_what_runs_on_it(cluster: Cluster) -> None:
    expected = await all_streams(cluster, asyncio.Event())
    before, flowing = await handed_over(cluster), asyncio.Event()
    with cluster.slow_steps():
        asking = asyncio.create_task(all_streams(cluster, flowing))
        await flowing.wait()
        worker = await busiest(cluster)
        assert await asyncio.to_thread(worker.stop) == 0
    assert await asking == expected
    assert await handed_over(cluster) > before


async def test_with_time_enough_everything_ends_where_it_runs(cluster: Cluster) -> None:
    await cluster.wait_serving(cluster.add_worker("decode"))
    before, flowing = await handed_over(cluster), asyncio.Event()
    with cluster.slow_steps():
        asking = asyncio.create_task(all_streams(cluster, flowing))
        await flowing.wait()
        left = await drain(await busiest(cluster), 120)
    assert left[0] > 0 and left[-1] == 0
    await asking
    assert await handed_over(cluster) == before


async def test_the_command_says_when_a_worker_is_drained(cluster: Cluster) -> None:
    async def say(address: str) -> tuple[int | None, str, str]:
        command = (*script("pagewire"), "drain", address, "--timeout=0")
        pipe = asyncio.subprocess.PIPE
        running = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        output, errors = await running.communicate()
        return running.returncode, output.decode(), errors.decode()

    worker = cluster.processes["prefill-1"]
    assert await say(worker.address) == (0, f"{worker.address} is drained\n", "")
    code, _, errors = await say("127.0.0.1:1")
    assert code == 1
    assert errors.startswith("pagewire: 127.0.0.1:1 was not drained: ") and errors.count("\n") == 1
