"""Processes die, clients leave: right tokens or a clear error, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import leaks
import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from streams import after, prompt_of, stream
from tiny_models import reference_greedy, reference_logprobs

SLOW = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=8", "--threads=1")


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One cluster for the tests that leave it as they found it."""
    async with running(Cluster(llama, tmp_path_factory.mktemp("shared"), worker_flags=SLOW)) as cluster:
        yield cluster


async def ask(cluster: Cluster, length: int, seed: int, max_tokens: int = 24) -> tuple[int, list[int] | str]:
    """Status and the tokens, or the error's sentence."""
    body = {"prompt": prompt_of(length, seed), "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    response = await cluster.http.post("/v1/completions", json=body)
    if response.status_code != 200:
        return response.status_code, response.json()["error"]["message"]
    return 200, response.json()["choices"][0]["token_ids"]


async def test_killing_a_prefill_worker_fails_no_request(llama: Path, tmp_path: Path) -> None:
    """Whatever it had done of a prompt is done again elsewhere, and the client's stream goes on."""
    made = Cluster(llama, tmp_path, prefill=2, decode=2, worker_flags=SLOW, router_flags=PAIRS, with_faults=True)
    async with running(made) as cluster:
        assert cluster.faults is not None
        (cluster.faults / "step:prefill:kill").write_text("after=5")  # of 32 steps that a prompt takes
        asking = [asyncio.create_task(ask(cluster, 250 + i, i)) for i in range(12)]
        judging = [asyncio.create_task(cluster.complete(prompt_of(150 + i, i), prompt_logprobs=0)) for i in range(4)]
        for i, (status, tokens) in enumerate(await asyncio.gather(*asking)):
            assert (status, tokens) == (200, reference_greedy(llama, prompt_of(250 + i, i), 24)[0])
        for i, answer in enumerate(await asyncio.gather(*judging)):
            prompt, told = prompt_of(150 + i, i), answer["choices"][0]["prompt_logprobs"]
            expected = [float(row[t]) for row, t in zip(reference_logprobs(llama, prompt), prompt[1:], strict=True)]
            found = [entry[str(t)]["logprob"] for entry, t in zip(told[1:], prompt[1:], strict=True)]
            assert told[0] is None and found == pytest.approx(expected, abs=2e-3)
        await cluster.wait_workers(3)
        assert sum(process.alive for process in cluster.processes.values() if process.role == "prefill") == 1
        assert (await cluster.metrics())["pagewire_retries_total{leg=prefill}"] > 0


async def test_without_any_prefill_worker_left_decode_does_it_all(llama: Path, tmp_path: Path) -> None:
    async with running(Cluster(llama, tmp_path)) as cluster:
        cluster.processes["prefill-0"].kill()
        status, tokens = await ask(cluster, 60, 1)
        assert (status, tokens) == (200, reference_greedy(llama, prompt_of(60, 1), 24)[0])


async def marked_stream(cluster: Cluster) -> list[int]:
    """Tokens that were drawn with a watermark, and of the typical ones only."""
    parameters = {"watermark": True, "typical_p": 0.8, "temperature": 1.3, "seed": 4, "max_new_tokens": 150}
    response = await cluster.http.post("/generate_stream", json={"inputs": "once", "parameters": parameters})
    events = [json.loads(line.removeprefix("data:")) for line in response.text.splitlines() if line]
    assert events[-1]["generated_text"] is not None, events[-1]
    return [event["token"]["id"] for event in events]


async def test_streams_outlive_their_decode_worker_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    """Killed in mid-stream, under seeds, penalties, stop strings, log probabilities and several choices."""
    everywhere = ("--routing-policy=round_robin",)  # so that every victim has streams
    made = Cluster(llama, tmp_path, decode=3, worker_flags=SLOW, router_flags=everywhere, with_faults=True)
    async with running(made) as cluster:
        assert cluster.faults is not None
        expected = await asyncio.gather(*(stream(cluster, i) for i in range(15)), marked_stream(cluster))
        for victim in ("decode-0", "decode-1"):
            (cluster.faults / f"step:{victim}:kill").write_text("after=60")  # of 150 steps that each stream takes
            streams = *(stream(cluster, i) for i in range(15)), marked_stream(cluster)
            with cluster.slow_steps(0.003):  # on a busy machine nothing was told yet of 60 steps, and nothing resumed
                assert await asyncio.gather(*streams) == expected
            assert not cluster.processes[victim].alive
        metrics = await cluster.metrics()
        assert metrics["pagewire_resumed_requests_total"] > 0
        assert metrics["pagewire_retries_total{leg=decode}"] > 0


async def test_a_stream_waits_for_a_decode_worker_to_come(llama: Path, tmp_path: Path) -> None:
    async with running(Cluster(llama, tmp_path, worker_flags=SLOW)) as cluster:
        expected = await stream(cluster, 1)
        kill, killed = cluster.processes["decode-0"].kill, asyncio.Event()
        asking = asyncio.create_task(stream(cluster, 1, after(30, lambda: (kill(), killed.set()))))
        await killed.wait()
        await cluster.wait_serving(cluster.add_worker("decode"))
        assert await asking == expected


async def test_a_stream_that_nobody_can_go_on_with_ends_with_an_error_event(llama: Path, tmp_path: Path) -> None:
    """Never in a clean stop after part of the text."""
    made = Cluster(llama, tmp_path, worker_flags=SLOW, router_flags=PAIRS, with_faults=True)
    async with running(made) as cluster:
        assert cluster.faults is not None
        (cluster.faults / "step:decode:kill").write_text("after=60")
        body = {"prompt": prompt_of(50, 1), "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with cluster.http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines()]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(events) > 1 and events[-1] != "[DONE]"
        assert json.loads(events[-1])["error"]["message"]
        added = cluster.add_worker("decode")
        await cluster.wait_serving(added)
        await cluster.wait_workers(2)


async def test_redis_dying_in_mid_traffic_fails_no_request_and_the_index_heals(llama: Path, tmp_path: Path) -> None:
    async with running(Cluster(llama, tmp_path, decode=2)) as cluster:
        before = [await ask(cluster, 80, i) for i in range(4)]
        asking = [asyncio.create_task(ask(cluster, 80, i)) for i in range(12)]
        redis = cluster.processes["redis"]
        redis.kill()
        for i, outcome in enumerate(await asyncio.gather(*asking)):
            assert outcome == (200, reference_greedy(llama, prompt_of(80, i), 24)[0])
        assert before == [await ask(cluster, 80, i) for i in range(4)]

        async def disconnected() -> bool:
            return not (await cluster.status()).redis_connected

        await cluster.until(disconnected, "the router did not notice")
        late = [await ask(cluster, 90, 100 + i) for i in range(3)]
        redis.start()

        async def healed() -> bool:
            status = await cluster.status()
            return status.redis_connected and status.indexed_blocks >= 12 + 3

        await cluster.until(healed, "the index did not heal")
        assert late == [await ask(cluster, 90, 100 + i) for i in range(3)]
        assert len((await cluster.status()).workers) == 3


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.08, 0.2, 0.5])
async def test_a_client_that_leaves_frees_everything(delay: float, shared: Cluster) -> None:
    """In the queue, in prefill, on the wire, in decode: `settle` finds nothing held afterwards."""
    body = {"prompt": prompt_of(300, int(delay * 1000)), "max_tokens": 200, "ignore_eos": True, "stream": True}

    async def leave(seed: int) -> None:
        async with httpx.AsyncClient(base_url=shared.base_url, trust_env=False) as client:
            try:
                async with asyncio.timeout(delay + 0.005 * seed):
                    async with client.stream("POST", "/v1/completions", json=body | {"seed": seed}) as response:
                        async for _ in response.aiter_lines():
                            pass
            except TimeoutError:
                pass

    await asyncio.gather(*(leave(seed) for seed in range(4)))
    await shared.settle()


async def test_native_calls_can_be_cancelled_and_time_out(shared: Cluster) -> None:
    from pagewire.v1 import common_pb2, inference_pb2

    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt_of(300, 7)),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True),
    )
    async with shared.inference() as stub:
        call = stub.Generate(request)
        async for event in call:
            if event.HasField("delta"):
                call.cancel()
                break
        told = ""  # by the router's last event or by the call, whichever clock strikes first
        try:
            async for event in stub.Generate(request, timeout=0.01):
                told = str(event.error)
        except grpc.RpcError as error:
            told = str(error)
        assert "DEADLINE" in told
    await shared.settle()


async def test_descriptors_and_threads_stay_flat(shared: Cluster) -> None:
    """A hundred requests, some of them abandoned, leave no descriptor and no thread behind."""

    async def round_of(seed: int) -> None:
        await asyncio.gather(*(ask(shared, 40 + i, seed + i, max_tokens=4) for i in range(8)))

    await round_of(0)
    await shared.settle()
    await asyncio.sleep(0.5)
    shared.ceiling = await leaks.ceilings(shared)
    for seed in range(12):
        await round_of(seed * 100)
    await shared.settle()


async def test_more_than_the_queue_holds_is_answered_429(llama: Path, tmp_path: Path) -> None:
    flags = (*SLOW, "--max-num-seqs=2")
    cluster = Cluster(llama, tmp_path, worker_flags=flags, router_flags=("--max-queued-requests=2",))
    async with running(cluster):
        responses = await asyncio.gather(
            *(cluster.http.post("/v1/completions", json={"prompt": prompt_of(100, i), "max_tokens": 100,
                                                         "ignore_eos": True}) for i in range(30))
        )  # fmt: skip
        refused = [r for r in responses if r.status_code == 429]
        assert refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert all(r.json()["error"]["code"] == "rate_limit_exceeded" for r in refused)
        assert sum(r.status_code == 200 for r in responses) == 30 - len(refused)
