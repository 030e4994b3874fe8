"""Embeddings on real workers: the hidden state that transformers has, whatever the runner, the batch or the client."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
import pytest_asyncio
import torch
from cluster import Cluster, running
from tiny_models import make_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = [[5, 9, 200, 17], [7], list(range(20, 150))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("embed")
    model = make_model(directory / "model", "qwen3")
    async with running(Cluster(model, directory, router_flags=("--served-model-name=demo",))) as started:
        yield started


def reference(model: Path, prompt: list[int]) -> list[float]:
    """The last token's last hidden state in transformers, of length 1."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        hidden = loaded.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    return (hidden / hidden.norm()).tolist()


async def post(cluster: Cluster, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await cluster.http.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_vectors_are_those_of_the_reference_alone_and_in_a_batch(cluster: Cluster) -> None:
    expected = [reference(cluster.model, prompt) for prompt in PROMPTS]
    together = await post(cluster, "/v1/embeddings", {"input": PROMPTS, "encoding_format": "float"})
    assert together["usage"] == {"prompt_tokens": 135, "total_tokens": 135}
    assert together["id"].startswith("embd-") and together["created"] > 1e9
    for prompt, wanted, found in zip(PROMPTS, expected, together["data"], strict=True):
        assert found["embedding"] == pytest.approx(wanted, abs=2e-5)
        alone = await post(cluster, "/v1/embeddings", {"input": prompt})
        assert alone["data"][0]["embedding"] == pytest.approx(found["embedding"], abs=1e-6)


async def test_inputs_are_cut_as_vllm_cuts_them(cluster: Cluster) -> None:
    """Their first tokens are used unless the client says otherwise; -1 is as many as the model takes."""

    async def vectors(*inputs: list[int], **fields: Any) -> list[list[float]]:
        answer = await post(cluster, "/v1/embeddings", {"input": [*inputs], **fields})
        return [found["embedding"] for found in answer["data"]]

    whole = PROMPTS[2]
    first, last = await vectors(whole[:20], whole[-20:])
    assert [first] == [pytest.approx(v, abs=1e-6) for v in await vectors(whole, truncate_prompt_tokens=20)]
    left = {"truncate_prompt_tokens": 20, "truncation_side": "left"}
    assert [last] == [pytest.approx(v, abs=1e-6) for v in await vectors(whole, **left)]
    longest = (await cluster.http.get("/v1/models")).json()["data"][0]["max_model_len"]
    long = [5 + i % 200 for i in range(longest + 9)]
    [cut] = await vectors(long, truncate_prompt_tokens=-1)
    assert [cut] == [pytest.approx(v, abs=1e-6) for v in await vectors(long[:longest])]
    for wrong in ({}, {"truncate_prompt_tokens": longest + 1}, {"truncate_prompt_tokens": 0}):
        refused = await cluster.http.post("/v1/embeddings", json={"input": long, **wrong})
        assert refused.status_code == 400, wrong


async def test_a_chat_is_embedded_as_its_template_writes_it(cluster: Cluster) -> None:
    """vLLM's form: without a generation prompt unless the client wants one."""
    chat = {"messages": [{"role": "user", "content": "Where is Tokyo?"}]}
    for asked in ({}, {"add_generation_prompt": True}):
        written = {"add_generation_prompt": False, **chat, **asked}
        tokens = (await cluster.http.post("/tokenize", json=written)).json()["tokens"]
        found = await post(cluster, "/v1/embeddings", {**chat, **asked, "encoding_format": "float"})
        assert found["usage"]["prompt_tokens"] == len(tokens)
        expected = await post(cluster, "/v1/embeddings", {"input": tokens})
        assert found["data"][0]["embedding"] == pytest.approx(expected["data"][0]["embedding"], abs=1e-6)
    for wrong, param in (
        ({"messages": []}, "messages"),
        ({**chat, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({**chat, "dimensions": 0}, "dimensions"),
        ({"messages": [{"role": "user", "content": "Tokyo is not far. " * 1000}]}, "messages"),  # for the model
        ({"messages": [{"role": "user", "content": "x" * (1 << 20)}]}, "messages"),  # for the tokenizer
    ):
        refused = await cluster.http.post("/v1/embeddings", json=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


async def test_embedding_beside_generation_disturbs_neither(cluster: Cluster) -> None:
    quiet = await cluster.complete(PROMPTS[2], max_tokens=40)
    vectors = await post(cluster, "/v1/embeddings", {"input": PROMPTS[2]})
    asked = [post(cluster, "/v1/embeddings", {"input": PROMPTS[2]}) for _ in range(8)]
    answers = await asyncio.gather(*(cluster.complete(PROMPTS[2], max_tokens=40) for _ in range(3)), *asked)
    assert all(answer["choices"][0]["token_ids"] == quiet["choices"][0]["token_ids"] for answer in answers[:3])
    assert all(answer["data"] == vectors["data"] for answer in answers[3:])


async def test_the_openai_client_reads_base64_as_floats(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused") as client:
        by_default = await client.embeddings.create(model="demo", input=["hello there", "hi"])
        as_floats = await client.embeddings.create(model="demo", input=["hello there", "hi"], encoding_format="float")
    for one, other in zip(by_default.data, as_floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)


async def test_ollamas_client_gets_the_same_vectors(cluster: Cluster) -> None:
    async with ollama.AsyncClient(cluster.base_url) as client:
        found = await client.embed("demo", ["hello there", "hi"])
        old = await client.embeddings("demo", "hi")
    expected = await post(cluster, "/v1/embeddings", {"input": ["hello there", "hi"]})
    vectors = [one["embedding"] for one in expected["data"]]
    assert [list(vector) for vector in found.embeddings] == vectors and list(old.embedding) == vectors[1]
    assert found.prompt_eval_count == expected["usage"]["prompt_tokens"]


async def test_ollama_embeds_no_empty_text_of_a_list(cluster: Cluster) -> None:
    """This tokenizer begins a text with nothing, so there is no token whose state could be the vector."""
    refused = await cluster.http.post("/api/embed", json={"model": "demo", "input": ["", "a"]})
    assert refused.status_code == 400 and "input 0 is empty" in refused.json()["error"]


async def test_what_has_no_effect_is_named(cluster: Cluster) -> None:
    asked = {"model": "demo", "input": "hi", "keep_alive": "5m", "options": {"num_ctx": 64}}
    answer = await cluster.http.post("/api/embed", json=asked)
    assert answer.headers["x-pagewire-ignored-fields"] == "keep_alive,options"
    ranked = await cluster.http.post("/v2/rerank", json={"query": "hi", "documents": ["a"], "priority": 1})
    assert ranked.headers["x-pagewire-ignored-fields"] == "priority"
    refused = await cluster.http.post("/v2/rerank", json={"query": "hi", "documents": []})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "documents"


async def test_vectors_have_as_many_dimensions_as_asked_and_length_1(cluster: Cluster) -> None:
    whole = (await post(cluster, "/v1/embeddings", {"input": "hi"}))["data"][0]["embedding"]
    for most in (1, 3, len(whole)):
        first = torch.tensor(whole[:most])
        expected = pytest.approx((first / first.norm()).tolist(), abs=1e-6)
        asked = {"input": ["hi"], "dimensions": most}
        assert (await post(cluster, "/v1/embeddings", asked))["data"][0]["embedding"] == expected
        assert (await post(cluster, "/api/embed", {"model": "demo", **asked}))["embeddings"] == [expected]
        encoded = await post(cluster, "/v1/embeddings", {**asked, "encoding_format": "base64"})
        assert len(base64.b64decode(encoded["data"][0]["embedding"])) == 4 * most
    for wrong in (0, -1, len(whole) + 1):
        refused = await cluster.http.post("/api/embed", json={"model": "demo", "input": "hi", "dimensions": wrong})
        assert refused.status_code == 400 and f"between 1 and {len(whole)}" in refused.json()["error"]


async def test_scores_and_rankings_are_cosines(cluster: Cluster) -> None:
    texts = ["alpha beta", "gamma", "alpha beta gamma", "zzz"]
    embedded = await post(cluster, "/v1/embeddings", {"input": texts})
    vectors = [torch.tensor(one["embedding"]) for one in embedded["data"]]
    cosines = [float(vectors[0] @ vector) for vector in vectors]
    scored = await post(cluster, "/v1/score", {"text_1": texts[0], "text_2": texts})
    assert [one["score"] for one in scored["data"]] == pytest.approx(cosines, abs=1e-6) and cosines[0] > 0.999
    for one, other in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        assert (await post(cluster, "/score", {one: texts[0], other: texts}))["data"] == scored["data"]
    ranked = await post(cluster, "/rerank", {"query": texts[0], "documents": texts, "top_n": 3})
    order = [one["index"] for one in ranked["results"]]
    assert order == sorted(range(4), key=lambda i: -cosines[i])[:3] and order[0] == 0
    assert ranked["results"][0]["document"] == {"text": texts[0]}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {"input": ""}, "empty"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": list(range(5, 250)) * 2}, "context length"),
        ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": [[999999]]}, "vocabulary"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    ],
)
async def test_mistakes_are_named(cluster: Cluster, path: str, body: dict[str, Any], words: str) -> None:
    response = await cluster.http.post(path, json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
