"""Beam search over HTTP against a plain one over transformers' forward pass: sequences, order and sums."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cluster import PAIRS, Cluster, running
from streams import prompt_of
from tiny_models import make_model, reference_beams

EOS = (2, *range(40, 80))  # so many that beams end all the time
CASES: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 2, "length_penalty": 0.0},
    {"n": 3, "length_penalty": 3.0, "max_tokens": 6},
    {"n": 3, "length_penalty": -2.0},
    {"n": 4, "ignore_eos": True, "temperature": 0.7, "top_p": 0.5, "seed": 3},
    {"n": 10, "max_tokens": 3},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("beams"), "llama", eos_token_id=list(EOS))


async def search(cluster: Cluster, prompt: list[int], **body: Any) -> dict[str, Any]:
    return await cluster.complete(prompt, use_beam_search=True, **body)


def check(model: Path, prompt: list[int], choices: list[dict[str, Any]], case: dict[str, Any]) -> None:
    """What was asked with the ends of sequences is the reference's: tokens, order, sums and reasons."""
    ends = () if case.get("ignore_eos") else EOS
    length, penalty = case.get("max_tokens", 12), case.get("length_penalty", 1.0)
    expected = reference_beams(model, prompt, case["n"], length, penalty, ends)
    assert [choice["token_ids"] for choice in choices] == [tokens for tokens, _ in expected]
    for choice, (tokens, total) in zip(choices, expected, strict=True):
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(total, abs=2e-3)
        assert choice["finish_reason"] == ("stop" if tokens[-1] in ends else "length")


async def check_cases(cluster: Cluster) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 7, 40, 70, 100, 130))]
    asked = [
        search(cluster, prompt, **case, include_stop_str_in_output=True, logprobs=0)
        for case, prompt in zip(CASES, prompts, strict=True)
    ]
    ended = 0
    for case, prompt, answer in zip(CASES, prompts, await asyncio.gather(*asked), strict=True):
        check(cluster.model, prompt, answer["choices"], case)
        lengths = [len(choice["token_ids"]) for choice in answer["choices"]]
        assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["usage"]["completion_tokens"] == sum(lengths)
        ended += sum(choice["finish_reason"] == "stop" for choice in answer["choices"])
    assert ended > 5


async def check_ends_are_not_told(cluster: Cluster) -> None:
    """As in vLLM: an end of sequence is no part of the choice, nor counted, unless that is asked for."""
    prompt = prompt_of(70, 7)
    answer = await search(cluster, prompt, n=3, logprobs=2, return_tokens_as_token_ids=True)
    expected = [tokens for tokens, _ in reference_beams(cluster.model, prompt, 3, 12, eos=EOS)]
    told = [tokens[:-1] if tokens[-1] in EOS else tokens for tokens in expected]
    assert [choice["token_ids"] for choice in answer["choices"]] == told != expected
    assert answer["usage"]["completion_tokens"] == sum(map(len, told))
    assert {len(top) for top in answer["choices"][-1]["logprobs"]["top_logprobs"]} <= {2, 3}
    echoed = await search(cluster, ["one", "two"], n=2, max_tokens=2, echo=True)  # type: ignore[arg-type]
    assert [choice["text"][:3] for choice in echoed["choices"]] == ["one", "one", "two", "two"]


async def check_chats(cluster: Cluster) -> None:
    """Whole and, as vLLM has it for chats alone, as a stream that comes at the end."""
    body = {"messages": [{"role": "user", "content": "hello"}], "use_beam_search": True, "n": 2, "max_tokens": 6,
            "logprobs": True, "top_logprobs": 1, "include_stop_str_in_output": True}  # fmt: skip
    whole = await cluster.http.post("/v1/chat/completions", json={**body, "return_token_ids": True, "seed": 1})
    assert whole.headers["x-pagewire-ignored-fields"] == "seed"
    choices, expected = whole.json()["choices"], []
    for tokens, total in reference_beams(cluster.model, choices[0]["prompt_token_ids"], 2, 6, eos=EOS):
        expected.append((tokens, pytest.approx(total, abs=2e-3)))
    sums = [sum(token["logprob"] for token in choice["logprobs"]["content"]) for choice in choices]
    assert [(choice["token_ids"], total) for choice, total in zip(choices, sums, strict=True)] == expected
    streamed = await cluster.http.post("/v1/chat/completions", json={**body, "stream": True})
    texts = ["", ""]
    for line in streamed.text.split("\n\n"):
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in choices]


async def check_refusals(cluster: Cluster) -> None:
    refused: dict[str, dict[str, Any]] = {
        "n": {"n": 11}, "stop": {"stop": ["a"]}, "length_penalty": {"length_penalty": 11}, "stream": {"stream": True},
        "presence_penalty": {"presence_penalty": 0.5}, "max_tokens": {"max_tokens": 0, "echo": True},
        "response_format": {"response_format": {"type": "json_object"}},
    }  # fmt: skip
    for param, fields in refused.items():
        body = {"prompt": "hello", "use_beam_search": True, **fields}
        response = await cluster.http.post("/v1/completions", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


async def check_cancel(cluster: Cluster) -> None:
    before = await cluster.metrics()

    async def searching() -> bool:
        return (await cluster.metrics())["pagewire_route_total"] > before["pagewire_route_total"] + 16

    with cluster.slow_steps():
        asking = asyncio.create_task(search(cluster, prompt_of(30, 8), n=8, max_tokens=220, ignore_eos=True))
        await cluster.until(searching, "the search did not begin")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await cluster.settle()
    after = await cluster.metrics()
    assert after["pagewire_requests_total{outcome=cancelled}"] == 1
    assert after["pagewire_finished_choices_total"] == before["pagewire_finished_choices_total"]


async def check_losses(cluster: Cluster) -> None:
    """A decode worker dies in mid-search, then the only prefill worker: the other decode worker does it all."""
    assert cluster.faults is not None
    case = {"n": 4, "max_tokens": 10, "ignore_eos": True}
    for seed, death in enumerate((cluster.faults / "reserve:decode:kill", cluster.faults / "step:prefill:kill")):
        death.write_text("after=4")
        prompt, alive = prompt_of(60, seed), len(cluster.workers)
        answer = await search(cluster, prompt, **case, logprobs=0)
        check(cluster.model, prompt, answer["choices"], case)
        assert not death.exists() and len(cluster.workers) == alive - 1
    totals = await cluster.metrics()
    assert totals["pagewire_retries_total"] >= 2 and totals["pagewire_route_total{decision=local}"] > 0


async def test_beams_are_those_of_a_plain_search(model: Path, tmp_path: Path) -> None:
    async with running(Cluster(model, tmp_path, decode=2, router_flags=PAIRS, with_faults=True)) as cluster:
        await check_cases(cluster)
        totals = await cluster.metrics()
        assert totals["pagewire_route_total{decision=pair}"] == totals["pagewire_route_total"]
        assert totals["decode:pagewire_kv_transfer_bytes_total"] > 0
        assert totals["pagewire_finished_choices_total"] == sum(case["n"] for case in CASES)
        await check_ends_are_not_told(cluster)
        await check_chats(cluster)
        await check_refusals(cluster)
        await check_cancel(cluster)
        await check_losses(cluster)
