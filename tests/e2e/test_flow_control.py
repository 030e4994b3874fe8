"""More is asked for than can be done, and some do not take what they asked for: on real processes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from cluster import Cluster, running
from pagewire.v1 import common_pb2, inference_pb2
from streams import prompt_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLAGS = (
    "--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-seqs=2", "--max-num-batched-tokens=64",
    "--threads=1",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("flow")
    made = Cluster(llama, directory, worker_flags=FLAGS, bridge_flags=("--send-timeout=1",), with_faults=True)
    async with running(made) as it:
        yield it


async def test_a_client_that_stops_reading_holds_nothing_for_long(cluster: Cluster) -> None:
    host, port = cluster.base_url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        prompts = [prompt_of(20, i) for i in range(4)]  # more in all than the kernel takes off our hands
        body = orjson.dumps({"prompt": prompts, "max_tokens": 480, "ignore_eos": True, "n": 2, "logprobs": 5,
                             "stream": True, "return_token_ids": True, "temperature": 1})  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        await loop.sock_sendall(client, head.encode() + body)
        assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 200")

        async def cut() -> bool:
            return (await cluster.metrics()).get("pagewire_bridge_requests_total{status=499}", 0) == 1

        await cluster.until(cut, "the client was not cut", timeout_s=120)
        await cluster.settle()
        with pytest.raises(ConnectionResetError):
            while await loop.sock_recv(client, 1 << 20):
                pass


async def test_a_tenant_that_floods_does_not_hold_up_another(cluster: Cluster) -> None:
    finished: list[str] = []

    async def ask(tenant: str, i: int, **fields: int) -> None:
        sampling = common_pb2.SamplingParams(max_tokens=20, ignore_eos=True)
        ids = inference_pb2.TokenIds(ids=prompt_of(150, i))
        request = inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling, tenant=tenant, **fields)
        responses = [response async for response in stub.Generate(request)]
        assert responses[-1].summary.completion_tokens == 20
        finished.append(tenant)

    async def until_there(count: int) -> None:
        async def there() -> bool:
            status = await cluster.status()
            return status.queued_requests + status.running_requests + len(finished) >= count

        await cluster.until(there, "not all are there")

    async with cluster.inference() as stub:
        with cluster.slow_steps(0.1):  # few of the flood are done before the others are there, however late that is
            flood = [asyncio.create_task(ask("flood", i)) for i in range(40)]
            await until_there(40)
            others = asyncio.gather(ask("urgent", 99, priority=-1), *(ask("modest", 100 + i) for i in range(5)))
            await until_there(46)
        await others
        assert finished.count("flood") < 25
        assert finished.index("urgent") < finished.index("modest") + 3
        await asyncio.gather(*flood)


async def test_who_cannot_be_served_in_time_is_told_at_once(cluster: Cluster) -> None:
    bodies = [{"max_tokens": 200, "ignore_eos": True} for _ in range(12)]

    async def moves() -> bool:
        return (await cluster.metrics()).get("pagewire_router_queue_seconds_count", 0) >= 4 and any(
            task.done() for task in crowd
        )

    with cluster.slow_steps():
        crowd = [asyncio.create_task(cluster.complete(prompt_of(200, i), **body)) for i, body in enumerate(bodies)]
        await cluster.until(moves, "the queue does not move")
        begun = time.monotonic()
        headers = {"x-envoy-expected-rq-timeout-ms": "50"}
        response = await cluster.http.post("/v1/completions", json={"prompt": prompt_of(20, 1)}, headers=headers)
    assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - begun < 5
    assert (await cluster.metrics())["pagewire_requests_total{outcome=deadline}"] == 1
    await asyncio.gather(*crowd)
