"""The network between prefill and decode workers is slow, lossy or gone, and only that: tokens are exact all the same.

Workers live in network namespaces, and a link that can be spoilt joins them; the router reaches both as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import network
import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from streams import prompt_of
from tiny_models import reference_greedy

FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=16", "--threads=1",
         "--transfer-timeout=4")  # fmt: skip
PROMPTS, NUM_OUTPUT = [prompt_of(200 + i, i) for i in range(4)], 16
WITHIN_S = 30.0

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.faults,
    pytest.mark.skipif(bool(network.why_not()), reason=network.why_not()),
]


@pytest.fixture(scope="module", params=["gloo", "grpc"])
def lane(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return [reference_greedy(llama, prompt, NUM_OUTPUT)[0] for prompt in PROMPTS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, lane: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    with network.Network() as net:
        made = Cluster(llama, tmp_path_factory.mktemp("network"), prefill=1, decode=2, with_faults=True, network=net,
                       worker_flags=(*FLAGS, f"--lanes={lane}"),
                       router_flags=(*PAIRS, "--transfer-timeout=4"))  # fmt: skip
        async with running(made):
            await made.raise_ceiling()
            yield made


async def ask_all(cluster: Cluster, salt: str) -> list[list[int]]:
    """The answers to all prompts at once, computed anew under each salt."""
    bodies = [cluster.complete(prompt, max_tokens=NUM_OUTPUT, ignore_eos=True, cache_salt=salt) for prompt in PROMPTS]
    async with asyncio.timeout(WITHIN_S):
        return [answer["choices"][0]["token_ids"] for answer in await asyncio.gather(*bodies)]


async def moved(cluster: Cluster, lane: str) -> float:
    return (await cluster.metrics()).get(f"pagewire_kv_transfer_bytes_total{{lane={lane}}}", 0.0)


@pytest.mark.parametrize(("mbit", "delay_s", "loss"), [(20, 0, 0), (0, 0.02, 0), (0, 0, 0.02), (50, 0.005, 0.01)])
async def test_a_bad_link_costs_time_and_nothing_else(
    cluster: Cluster, expected: list[list[int]], lane: str, mbit: int, delay_s: float, loss: float
) -> None:
    before = await moved(cluster, lane)
    assert cluster.network is not None
    cluster.network.spoil(delay_s, loss)
    if mbit:
        cluster.network.limit(mbit)
    try:
        assert await ask_all(cluster, f"{mbit} {delay_s} {loss}") == expected
    finally:
        cluster.network.spoil()
        if mbit:
            cluster.network.unlimit()
    assert await moved(cluster, lane) > before
    await cluster.settle()


@pytest.mark.parametrize("how", ["swallows everything", "is down"])
@pytest.mark.parametrize("when", ["before", "while streaming"])
async def test_without_a_link_requests_are_served_all_the_same(
    cluster: Cluster, expected: list[list[int]], how: str, when: str
) -> None:
    """The router reaches everybody; only KV does not pass. It does again once the link is back."""
    assert cluster.network is not None and cluster.faults is not None
    cluster.processes["router"].kill()  # the next one has no pair of workers down as bad, as this one may for minutes
    await cluster.mend()
    cut = cluster.network.down if how == "is down" else lambda: cluster.network.spoil(loss=1)
    if when == "while streaming":
        armed = cluster.faults / "bytes-sent:prefill:delay"
        armed.write_text("seconds=0.3")
        asking = asyncio.create_task(ask_all(cluster, how + when))
        async with asyncio.timeout(WITHIN_S):
            while armed.exists():
                await asyncio.sleep(0.005)
        cut()
    else:
        cut()
        asking = asyncio.create_task(ask_all(cluster, how + when))
    try:
        assert await asking == expected
    finally:
        cluster.network.spoil()
        cluster.network.up()
    await cluster.settle()
    assert await ask_all(cluster, "after " + how + when) == expected
