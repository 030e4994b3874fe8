"""The disaggregated system over HTTP against transformers on the same weights, token for token.

Every cluster has poisoned pages; each test ends with nothing held anywhere and clean exits.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from cluster import PAIRS, SMALL, Cluster, running
from engines import Run, make_engine, run_all
from tiny_models import ARCHITECTURES, VOCAB, make_model, reference_greedy, reference_logprobs

LENGTHS = (1, 7, 16, 33, 64, 130)  # one token ... several chunks of 40


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB) for _ in range(length)] for length in lengths]


async def check_greedy(cluster: Cluster, asked: list[list[int]]) -> list[dict[str, Any]]:
    """All prompts at once; tokens equal the reference and log probabilities are near it."""
    answers = await asyncio.gather(*(cluster.complete(prompt, logprobs=0) for prompt in asked))
    for prompt, answer in zip(asked, answers, strict=True):
        tokens, logprobs = reference_greedy(cluster.model, prompt, 12)
        [choice] = answer["choices"]
        if 2 in tokens:  # the reference does not stop at the end-of-sequence token
            tokens = tokens[: tokens.index(2) + 1]
        assert choice["token_ids"] == tokens, f"wrong tokens for a prompt of {len(prompt)}"
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs[: len(tokens)], abs=2e-3)
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    return list(answers)


async def check_prompt(cluster: Cluster, prompt: list[int]) -> None:
    """What is told of the prompt's own tokens is the reference's, though all of the prompt is cached."""
    answer = await cluster.complete(prompt, prompt_logprobs=3, echo=True, logprobs=1)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    expected, [choice] = reference_logprobs(cluster.model, prompt), answer["choices"]
    own = [float(row[token]) for row, token in zip(expected, prompt[1:], strict=True)]
    [first, *others], echoed = choice["prompt_logprobs"], choice["logprobs"]["token_logprobs"]
    assert first is None and len(others) == len(prompt) - 1 and echoed[0] is None
    told_own = [told[str(token)]["logprob"] for told, token in zip(others, prompt[1:], strict=True)]
    assert told_own == pytest.approx(own, abs=2e-3) and echoed[1 : len(prompt)] == told_own
    for row, told, token in zip(expected, others, prompt[1:], strict=True):
        assert told[str(token)]["rank"] == int((row >= row[token]).sum())
        assert {int(i) for i, entry in told.items() if entry["rank"] <= 3} == set(row.topk(3).indices.tolist())
    tokens, logprobs = reference_greedy(cluster.model, prompt, len(echoed) - len(prompt))
    assert choice["token_ids"] == tokens and echoed[len(prompt) :] == pytest.approx(logprobs, abs=2e-3)


async def prove_transfer(cluster: Cluster, num_prompt_tokens: int, bytes_per_token: int) -> None:
    """Bytes crossed, at most as many as the prompts' KV takes, and no decode worker recomputed a prompt.

    A disaggregated system once passed every test while decode silently recomputed all prompts.
    """
    totals = await cluster.metrics()
    # A prompt whose blocks are mostly on the decode worker may stay there: less than a hash block is computed.
    local = totals.get("pagewire_route_total{decision=local}", 0)
    assert totals["decode:pagewire_engine_prompt_tokens_computed_total"] <= 63 * local
    assert local < totals["pagewire_route_total{decision=pair}"]
    sent = totals["prefill:pagewire_kv_transfer_bytes_total"]
    assert 0 < sent == totals["decode:pagewire_kv_transfer_bytes_total"]
    assert sent <= num_prompt_tokens * bytes_per_token
    assert totals.get("decode:pagewire_kv_checksum_failures_total", 0) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_one_prefill_and_one_decode_worker_equal_the_reference(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    asked = prompts(*LENGTHS)
    async with running(Cluster(model, tmp_path, router_flags=PAIRS)) as cluster:
        first = await check_greedy(cluster, asked)
        assert all(a["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 for a in first)
        kv_bytes = 3 * 2 * 4 * {"llama": 16, "mistral": 32, "qwen2": 32, "qwen3": 64}[architecture]
        totals = await cluster.metrics()
        assert totals["decode:pagewire_kv_transfer_bytes_total"] == sum(LENGTHS) * kv_bytes
        assert totals["decode:pagewire_engine_prompt_tokens_computed_total"] == 0
        second = await check_greedy(cluster, asked)  # now with prefix hits on both sides
        hits = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in second]
        # Whole pages; at most all but the last token, whose logits are always computed.
        assert hits == [(n - 1) // 16 * 16 for n in LENGTHS]
        await prove_transfer(cluster, 2 * sum(LENGTHS), kv_bytes)
        for prompt in (*asked[:2], asked[-1]):
            await check_prompt(cluster, prompt)


@pytest.mark.parametrize("lane", ["shm", "gloo", "grpc"])
async def test_every_lane_gives_the_same_tokens_on_two_by_two_workers(lane: str, llama: Path, tmp_path: Path) -> None:
    asked = prompts(*LENGTHS, *range(20, 90, 7), seed=1)
    cluster = Cluster(
        llama, tmp_path, prefill=2, decode=2, worker_flags=(*SMALL, f"--lanes={lane}"), router_flags=PAIRS
    )
    async with running(cluster):
        for _ in range(3):
            await check_greedy(cluster, asked)
        await prove_transfer(cluster, 3 * sum(map(len, asked)), 384)
        text = (await cluster.http.get("/metrics")).text
        assert f'lane="{lane}"' in text
        used = [line for line in text.splitlines() if line.startswith("pagewire_engine_steps_total")]
        assert len(used) == 4 and not any(line.endswith(" 0.0") for line in used), "a worker never worked"


async def test_workers_with_both_roles_equal_the_reference(llama: Path, tmp_path: Path) -> None:
    asked = prompts(*LENGTHS, seed=2)
    async with running(Cluster(llama, tmp_path, prefill=0, decode=0, both=2)) as cluster:
        for _ in range(2):
            await check_greedy(cluster, asked)


async def test_a_decode_worker_that_preempts_gives_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    """A pool of 28 blocks for six sequences that grow to 18 blocks each: any two at once are too many."""
    flags = ("--kv-cache-memory-bytes=172032", "--max-model-len=320", "--max-num-batched-tokens=40", "--threads=1")
    asked = prompts(*[40 + i for i in range(6)], seed=3)
    async with running(Cluster(llama, tmp_path, worker_flags=flags, router_flags=PAIRS)) as cluster:
        answers = await asyncio.gather(*(cluster.complete(prompt, max_tokens=240, ignore_eos=True) for prompt in asked))
        for prompt, answer in zip(asked, answers, strict=True):
            assert answer["choices"][0]["token_ids"] == reference_greedy(llama, prompt, 240)[0]
        assert (await cluster.metrics())["decode:pagewire_engine_preemptions_total"] > 0


SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "truncated": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    "penalized": {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "biased": {"temperature": 1.0, "logit_bias": {"40": 3.0, "41": -100.0}, "min_tokens": 5},
}


TGI_SAMPLINGS: list[dict[str, Any]] = [
    {"seed": 11, "temperature": 1.2},
    {"seed": 11, "temperature": 1.2, "typical_p": 0.4},
    {"seed": 11, "temperature": 1.2, "watermark": True},
    {"seed": 11, "temperature": 1.2, "watermark": True, "typical_p": 0.4, "top_k": 50},
]


async def generate(cluster: Cluster, **parameters: Any) -> tuple[list[int], list[int]]:
    """POST /generate: ids of the prompt and of the answer."""
    body = {"inputs": "Once upon a time", "parameters": parameters | {"max_new_tokens": 12, "details": True}}
    tokens = (await cluster.http.post("/generate", json=body)).json()["details"]["tokens"]
    prompt = (await cluster.http.post("/tokenize", json={"inputs": "Once upon a time"})).json()
    return [token["id"] for token in prompt], [token["id"] for token in tokens]


async def test_seeded_sampling_equals_our_own_single_process(llama: Path, tmp_path: Path) -> None:
    """Who samples a token, and in which batch, is not part of (seed, choice, position)."""
    asked = prompts(5, 50, 120, seed=4)
    async with running(Cluster(llama, tmp_path, router_flags=PAIRS)) as cluster:
        cases = [(prompt, name) for prompt in asked for name in SAMPLINGS]
        answers = await asyncio.gather(
            *(cluster.complete(p, n=3, seed=11, ignore_eos=True, **SAMPLINGS[name]) for p, name in cases)
        )
        generated = [await generate(cluster, **params) for params in TGI_SAMPLINGS]
    engine = make_engine(llama)
    for params, (prompt, tokens) in zip(TGI_SAMPLINGS, generated, strict=True):
        run_all(engine, run := Run(prompt, eos_token_ids=frozenset({2}), **params))
        assert tokens == run.tokens()
    assert len({tuple(tokens) for _, tokens in generated}) == len(TGI_SAMPLINGS)
    for (prompt, name), answer in zip(cases, answers, strict=True):
        params = dict(SAMPLINGS[name])
        if "logit_bias" in params:
            params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
        run = Run(prompt, n=3, seed=11, ignore_eos=True, **params)
        run_all(engine, run)
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert [c["token_ids"] for c in answer["choices"]] == [run.tokens(i) for i in range(3)], name
        assert len({tuple(run.tokens(i)) for i in range(3)}) > 1


async def test_a_worker_added_while_running_is_used(llama: Path, tmp_path: Path) -> None:
    async with running(Cluster(llama, tmp_path, router_flags=PAIRS)) as cluster:
        await check_greedy(cluster, prompts(30))
        added = cluster.add_worker("decode")
        await cluster.wait_serving(added)
        await cluster.wait_workers(3)
        cluster.processes["decode-0"].stop()
        await cluster.wait_workers(2)
        await check_greedy(cluster, prompts(*LENGTHS, seed=5))
        assert '"decode done"' in added.log.read_text()
