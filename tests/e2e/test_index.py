"""Real routers and workers through every loss of Redis: no request fails, and the index is right again by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_core.rpc import open_channel
from processes import free_port, script
from prometheus_client.parser import text_string_to_metric_families
from streams import prompt_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=64", "--threads=1")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """What the index says decides alone: by predicted time a tiny prompt may as well be computed anew."""
    directory = tmp_path_factory.mktemp("index")
    async with running(Cluster(llama, directory, prefill=2, worker_flags=FLAGS, router_flags=PAIRS)) as it:
        yield it


class Router:
    """One router, asked over gRPC."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def ask(self, prompt: list[int]) -> tuple[list[int], inference_pb2.Summary]:
        sampling = common_pb2.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling)
        responses = [response async for response in self._stub.Generate(request)]
        assert responses[-1].HasField("summary"), responses[-1]
        return [t.token_id for r in responses for t in r.delta.tokens], responses[-1].summary

    async def metrics(self) -> dict[str, float]:
        text = (await self._stub.Metrics(inference_pb2.MetricsRequest())).text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return {s.name: s.value for s in samples if s.labels.get("instance") == "router"}


async def until(cluster: Cluster, router: Router, name: str, value: Any, timeout_s: float = 40) -> None:
    async def is_so() -> bool:
        found = (await router.metrics())[name]
        return value(found) if callable(value) else found == value

    await cluster.until(is_so, f"{name} is not what it should be", timeout_s=timeout_s)


async def test_the_index_is_right_whatever_becomes_of_redis(cluster: Cluster) -> None:
    router = Router(cluster.processes["router"].address)
    redis = cluster.processes["redis"]
    prompts = [prompt_of(200, seed) for seed in range(6)]
    tokens = [(await router.ask(prompt))[0] for prompt in prompts[:2]]
    await until(cluster, router, "pagewire_index_blocks", lambda blocks: blocks >= 2 * 2 * 3)
    assert (await router.metrics())["pagewire_index_level"] == 0

    # What is expected of a cache is there, and it is told which part of it was not.
    for prompt, expected in zip(prompts[:2], tokens, strict=True):
        again, summary = await router.ask(prompt)
        assert again == expected and summary.cached_tokens >= 192
    metrics = await router.metrics()
    assert metrics["pagewire_expected_hit_tokens_total"] == 2 * 192
    assert metrics["pagewire_false_hit_tokens_total"] == 0

    # Redis is gone: what workers store from now on is asked of them.
    redis.kill()
    await until(cluster, router, "pagewire_index_level", 1)
    before = (await router.metrics())["pagewire_index_blocks"]
    tokens += [(await router.ask(prompt))[0] for prompt in prompts[2:4]]
    await until(cluster, router, "pagewire_index_blocks", lambda blocks: blocks >= before + 2 * 2 * 3)

    # A router that never had a Redis: workers by address, blocks from the workers themselves.
    port = free_port()
    addresses = ",".join(worker.address for worker in cluster.workers)
    cold = cluster._add("router-2", [*script("pagewire-router"), f"--model={cluster.model}", f"--port={port}",
                                     f"--workers={addresses}", *PAIRS], port)  # fmt: skip
    await cluster.wait_serving(cold)
    second = Router(cold.address)
    await until(cluster, second, "pagewire_index_blocks", (await router.metrics())["pagewire_index_blocks"])
    assert (await second.metrics())["pagewire_index_level"] == 3
    for prompt, expected in zip(prompts, tokens, strict=False):
        again, summary = await second.ask(prompt)
        assert again == expected and summary.cached_tokens >= 192
    await second.close()
    assert await asyncio.to_thread(cold.stop) == 0

    # Redis is back and empty.
    redis.start()
    await until(cluster, router, "pagewire_index_level", 0)
    tokens += [(await router.ask(prompt))[0] for prompt in prompts[4:]]
    await until(cluster, router, "pagewire_index_blocks", lambda blocks: blocks >= 6 * 2 * 3)
    for prompt, expected in zip(prompts, tokens, strict=True):
        again, summary = await router.ask(prompt)
        assert again == expected and summary.cached_tokens >= 192
    metrics = await router.metrics()
    assert metrics["pagewire_false_hit_tokens_total"] == 0 and metrics["pagewire_index_age_seconds"] == 0
    await router.close()
