"""Workers of several ranks, as processes: what they hand over, what they answer, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from cluster import PAIRS, SMALL, Cluster, Process, running
from engines import Run, make_engine, run_all
from processes import lives
from streams import after, stream
from tiny_models import make_model, reference_greedy

PROMPTS = [[(7 * i + 13 * length) % 300 + 5 for i in range(length)] for length in (1, 16, 70, 130)]
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 3}
STREAMS = 4


def ranks(worker: Process) -> list[psutil.Process]:
    """The other ranks of a worker."""
    return [p for p in psutil.Process(worker.pid).children() if "pagewire_engine.parallel.rank" in p.cmdline()]


async def test_workers_of_any_shape_hand_over_answer_and_die(tmp_path: Path) -> None:
    """Two stages with pages of 32 compute prompts, two ranks with pages of 16 go on; another pair has pages of 64."""
    model = make_model(tmp_path / "model", "qwen2")
    shapes = {"prefill": ["-pp=2", "--block-size=32"], "decode": ["-tp=2"]}
    async with running(Cluster(model, tmp_path, worker_flags=SMALL, role_flags=shapes, router_flags=PAIRS)) as cluster:
        stages, pair = cluster.processes["prefill-0"], cluster.processes["decode-0"]
        members = [ranks(worker) for worker in (stages, pair)]
        assert [len(found) for found in members] == [1, 1]
        await check_answers(cluster)
        await check_transfers(cluster)
        expected = await all_streams(cluster)

        other = cluster.add_worker("decode", flags=["--block-size=64"])
        await cluster.wait_serving(other)
        await cluster.wait_workers(3)
        members.append(ranks(other))
        [[rank_of_pair]] = [members[1]]
        assert await all_streams(cluster, after(20, rank_of_pair.kill)) == expected
        await gone(pair, "a worker went on without its rank")
        why = ("a rank of this worker has ended", "a step was lost between the ranks")  # whoever saw it first
        assert any(sentence in pair.log.read_text() for sentence in why)
        await cluster.wait_workers(2)

        stages.kill()
        await cluster.wait_workers(1)
        assert await all_streams(cluster) == expected  # all of it on two ranks with pages of 64
    assert not [rank for found in members for rank in found if lives(rank)], "a rank outlived its worker"


async def check_answers(cluster: Cluster) -> None:
    """Greedy tokens are those of transformers, drawn ones and all log probabilities those of one rank, to the bit."""
    engine = make_engine(cluster.model)
    for prompt in PROMPTS:
        greedy, drawn = await asyncio.gather(cluster.complete(prompt, logprobs=0, ignore_eos=True),
                                             cluster.complete(prompt, **DRAWN, ignore_eos=True))  # fmt: skip
        assert greedy["choices"][0]["token_ids"] == reference_greedy(cluster.model, prompt, 12)[0]
        alone = Run(prompt, logprobs=0, ignore_eos=True), Run(prompt, **DRAWN, ignore_eos=True)
        run_all(engine, *alone)
        for answer, run in zip((greedy, drawn), alone, strict=True):
            [choice] = answer["choices"]
            assert choice["token_ids"] == run.tokens()
            assert choice["logprobs"]["token_logprobs"] == run.logprobs()


async def check_transfers(cluster: Cluster) -> None:
    """Every token of every prompt crossed, but those that decode had from an equal prompt; none was computed twice."""
    totals = await cluster.metrics()
    bytes_per_token = 3 * 2 * 2 * 16 * 4
    sent = totals["decode:pagewire_kv_transfer_bytes_total"]
    assert sum(map(len, PROMPTS)) * bytes_per_token <= sent <= 2 * sum(map(len, PROMPTS)) * bytes_per_token
    assert sent == totals["prefill:pagewire_kv_transfer_bytes_total"]
    assert totals["decode:pagewire_engine_prompt_tokens_computed_total"] == 0
    assert totals.get("decode:pagewire_kv_checksum_failures_total", 0) == 0


async def all_streams(cluster: Cluster, arrived: Callable[[], object] = lambda: None) -> list[Any]:
    return await asyncio.gather(*(stream(cluster, i, arrived, max_tokens=60) for i in range(STREAMS)))


async def gone(worker: Process, complaint: str) -> None:
    for _ in range(1200):
        if not worker.alive:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(complaint)
