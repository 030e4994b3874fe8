"""TGI's, Ollama's and Anthropic's APIs on one endpoint, driven by their own clients, on real workers.

One prefill and one decode worker serve the demo model; whatever the API, the same prompt gives the same greedy text.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import ollama
import pytest
import pytest_asyncio
from cluster import Cluster, running
from huggingface_hub import InferenceClient
from pagewire_cli.serve import demo_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "What is the capital of Japan?"
MESSAGES = [{"role": "user", "content": QUESTION}]
FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=512", "--threads=1")
GREEDY = {"temperature": 0}
RAW = "<|im_start|>user\nCount from 3 to 9.<|im_end|>\n<|im_start|>assistant\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("apis")
    router = (
        "--served-model-name=demo",
        "--trust-request-chat-template",
        "--max-logprobs=25",
        '--override-generation-config={"temperature": 0}',
    )
    tools = ("--tool-call-parser=json",)
    made = Cluster(demo_model(), directory, worker_flags=FLAGS, router_flags=router, bridge_flags=tools)
    async with running(made) as started:
        yield started


async def openai_text(cluster: Cluster, messages: list[dict[str, str]] = MESSAGES, **fields: Any) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, **fields}
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def data_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
ASK_WEATHER = [{"role": "user", "content": "Call get_weather for Rome in celsius."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ollama_client(cluster: Cluster) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(cluster.base_url) as client:
        yield client


# ---------------------------------------------------------------- OpenAI with vLLM's fields

COUNT = [{"role": "user", "content": "Count from 3 to 9."}]


async def test_what_may_not_be_written_is_not(cluster: Cluster) -> None:
    """From the first token, which the prefill worker chooses, on."""
    assert await openai_text(cluster, COUNT) == "3, 4, 5, 6, 7, 8, 9."
    for words in (["3"], ["5", "7"], ["4, 5"]):
        text = await openai_text(cluster, COUNT, bad_words=words)
        assert text and not any(word in text for word in words)
    asked = await cluster.http.post("/tokenize", json={"prompt": "1, 2", "add_special_tokens": False})
    allowed = asked.json()["tokens"]
    body = {"messages": COUNT, "max_tokens": 9, "temperature": 1, "seed": 3, "allowed_token_ids": allowed,
            "logprobs": True, "logprob_token_ids": allowed[:2], "return_token_ids": True}  # fmt: skip
    [choice] = (await cluster.http.post("/v1/chat/completions", json=body)).json()["choices"]
    assert len(choice["token_ids"]) == 9 and set(choice["token_ids"]) <= set(allowed)
    assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    refused = await cluster.http.post("/v1/chat/completions", json={**body, "allowed_token_ids": [10**9]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "allowed_token_ids"


# ---------------------------------------------------------------- TGI


async def generate(cluster: Cluster, path: str = "/generate", **parameters: Any) -> httpx.Response:
    return await cluster.http.post(path, json={"inputs": RAW, "parameters": parameters})


async def test_tgi_details_add_up_to_the_text(cluster: Cluster) -> None:
    response = await generate(cluster, max_new_tokens=40, details=True, top_n_tokens=2)
    answer = response.json()
    details = answer["details"]
    assert answer["generated_text"] == "3, 4, 5, 6, 7, 8, 9."
    assert details["finish_reason"] == "eos_token" and details["prefill"] == [] and details["seed"] is None
    assert details["generated_tokens"] == len(details["tokens"]) == len(details["top_tokens"])
    assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == answer["generated_text"]
    assert details["tokens"][-1]["special"] and all(t["logprob"] <= 0 for t in details["tokens"])
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 2 and top[0]["id"] == token["id"]
    headers = response.headers
    assert headers["x-generated-tokens"] == str(details["generated_tokens"])
    for name in ("compute-type", "compute-time", "compute-characters", "total-time", "validation-time", "queue-time",
                 "inference-time", "time-per-token", "prompt-tokens"):  # fmt: skip
        assert f"x-{name}" in headers


async def test_tgi_stream_ends_with_the_whole_answer(cluster: Cluster) -> None:
    whole = (await generate(cluster, max_new_tokens=40, details=True)).json()
    response = await generate(cluster, "/generate_stream", max_new_tokens=40)
    events = data_of(response.text)
    assert "[DONE]" not in response.text and [e["index"] for e in events] == list(range(1, len(events) + 1))
    assert [e["token"]["id"] for e in events] == [t["id"] for t in whole["details"]["tokens"]]
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["finish_reason"] == "eos_token" and events[-1]["details"]["input_length"] > 0


async def test_tgi_keeps_the_stop_sequence_and_counts_length(cluster: Cluster) -> None:
    stopped = (await generate(cluster, max_new_tokens=40, stop=["6, 7"], details=True)).json()
    assert stopped["generated_text"] == "3, 4, 5, 6, 7" and stopped["details"]["finish_reason"] == "stop_sequence"
    cut = (await generate(cluster, max_new_tokens=3, details=True, return_full_text=True)).json()
    assert cut["generated_text"].startswith(RAW) and cut["details"]["finish_reason"] == "length"
    assert cut["details"]["generated_tokens"] == 3


async def test_tgi_seeds_repeat_and_best_of_shows_the_others(cluster: Cluster) -> None:
    sampled = [(await generate(cluster, do_sample=True, seed=7, temperature=1.5)).json() for _ in range(2)]
    assert sampled[0] == sampled[1]
    best = (await generate(cluster, do_sample=True, best_of=2, details=True, temperature=1.5)).json()["details"]
    [other] = best["best_of_sequences"]
    mean = [sum(t["logprob"] for t in one["tokens"]) / len(one["tokens"]) for one in (best, other)]
    assert mean[0] >= mean[1] and best["seed"] == other["seed"] is not None


async def test_tgi_tells_the_seed_that_was_drawn(cluster: Cluster) -> None:
    asked = {"do_sample": True, "temperature": 1.5, "details": True, "max_new_tokens": 20}
    drawn = (await generate(cluster, **asked)).json()
    again = (await generate(cluster, **asked, seed=drawn["details"]["seed"])).json()
    assert again == drawn and (await generate(cluster, **asked)).json()["details"]["seed"] != drawn["details"]["seed"]
    events = data_of((await generate(cluster, "/generate_stream", **asked)).text)
    again = (await generate(cluster, **asked, seed=events[-1]["details"]["seed"])).json()
    assert again["generated_text"] == events[-1]["generated_text"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": ""}, "inputs"),
        ({}, "inputs"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, "temperature"),
        ({"inputs": "x", "parameters": {"top_p": 1.0}}, "top_p"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, "best_of"),
        ({"inputs": "x", "parameters": {"best_of": 2, "do_sample": True, "seed": 1}}, "seed"),
        ({"inputs": "x", "parameters": {"stop": ["a"] * 5}}, "stop"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 4096}}, "context length"),
        ({"inputs": "x " * 2000}, "context length"),
        ({"inputs": "x", "parameters": {"typical_p": 1.0}}, "typical_p"),
        ({"inputs": "x", "parameters": {"adapter_id": "a"}}, "adapter_id"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_tgi_mistakes_are_422(cluster: Cluster, path: str, body: dict[str, Any], words: str) -> None:
    response = await cluster.http.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation" and words in response.json()["error"]


async def test_tgi_truncates_when_asked(cluster: Cluster) -> None:
    parameters = {"truncate": 64, "max_new_tokens": 2}
    response = await cluster.http.post("/generate", json={"inputs": "word " * 2000, "parameters": parameters})
    assert response.status_code == 200 and response.headers["x-prompt-tokens"] == "64"


@pytest.mark.parametrize("kind", ["json", "json_schema", "regex"])
async def test_tgi_grammars_are_followed(cluster: Cluster, kind: str) -> None:
    named = {"name": "person", "schema": PERSON}
    value: Any = {"json": PERSON, "json_schema": named, "regex": "[0-9]{3}-[a-z]{2}"}[kind]
    grammar = {"type": kind, "value": value}
    text = (await generate(cluster, max_new_tokens=60, grammar=grammar)).json()["generated_text"]
    if kind == "regex":
        assert re.fullmatch(value, text)
    else:
        jsonschema.validate(json.loads(text), PERSON)
    bad = await generate(cluster, grammar={"type": "regex", "value": "("})
    assert bad.status_code == 422 and bad.json()["error_type"] == "validation"


async def test_huggingface_hub_client_works(cluster: Cluster) -> None:
    def ask() -> tuple[str, list[str], str]:
        native = InferenceClient(model=cluster.base_url)
        text = native.text_generation(RAW, max_new_tokens=40)
        streamed = list(native.text_generation(RAW, max_new_tokens=40, stream=True))
        chat = InferenceClient(base_url=cluster.base_url).chat_completion(MESSAGES, max_tokens=24, temperature=0)
        return text, streamed, str(chat.choices[0].message.content)

    def ask_for_details() -> Any:
        client = InferenceClient(model=cluster.base_url)
        more = {"decoder_input_details": True, "top_n_tokens": 1, "watermark": True, "typical_p": 0.9, "seed": 3}
        return client.text_generation(RAW, max_new_tokens=40, details=True, return_full_text=True, **more)

    detailed = await asyncio.to_thread(ask_for_details)
    prefill = detailed.details.prefill
    assert "".join(token.text for token in prefill) == RAW and detailed.generated_text.startswith(RAW)
    assert prefill[0].logprob is None and all(token.logprob <= 0 for token in prefill[1:])
    text, streamed, chat = await asyncio.to_thread(ask)
    assert text.removeprefix(RAW) == "3, 4, 5, 6, 7, 8, 9." == "".join(streamed).replace("<|im_end|>", "")
    assert chat == await openai_text(cluster)


async def test_platform_routes_answer_like_generate(cluster: Cluster) -> None:
    expected = "3, 4, 5, 6, 7, 8, 9."
    parameters = {"max_new_tokens": 40}
    body = {"inputs": RAW, "parameters": parameters}
    for path in ("/invocations", "/"):
        assert (await cluster.http.post(path, json=body)).json() == [{"generated_text": RAW + expected}]
        streamed = data_of((await cluster.http.post(path, json={**body, "stream": True})).text)
        assert streamed[-1]["generated_text"] == RAW + expected
        alone = {**body, "parameters": {**parameters, "return_full_text": False}}
        assert (await cluster.http.post(path, json=alone)).json() == [{"generated_text": expected}]
    vertex = await cluster.http.post("/vertex", json={"instances": [body, body]})
    assert vertex.json() == {"predictions": [expected] * 2}
    asked = {"instances": [{"messages": COUNT, "max_tokens": 40, "temperature": 0}]}
    assert (await cluster.http.post("/vertex", json=asked)).json() == {"predictions": [expected]}
    chat = await cluster.http.post("/invocations", json={"messages": MESSAGES, "max_tokens": 8})
    assert chat.json()["object"] == "chat.completion"
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES"}
    for data in ([RAW], list(RAW.encode())):
        inference = {"id": "7", "inputs": [{**tensor, "data": data}], "parameters": parameters}
        answer = (await cluster.http.post("/v2/models/demo/infer", json=inference)).json()
        [output] = answer["outputs"]
        text = output["data"][0] if isinstance(output["data"][0], str) else bytes(output["data"]).decode()
        assert answer["id"] == "7" and text == expected and output["name"] == "text_output"
    named = {**inference, "outputs": [{"name": "mine"}]}
    assert (await cluster.http.post("/v2/models/demo/infer", json=named)).json()["outputs"][0]["name"] == "mine"
    refused = await cluster.http.post("/v2/models/demo/infer", json={**inference, "outputs": [{"name": {}}]})
    assert refused.status_code == 422 and "outputs" in refused.json()["error"]
    assert (await cluster.http.get("/v2/health/ready")).json()["ready"] is True
    about = (await cluster.http.get("/info")).json()
    assert about["max_total_tokens"] == 512 and about["model_pipeline_tag"] == "text-generation"
    assert about["max_concurrent_requests"] > 1024 and about["max_batch_total_tokens"] > 512


async def test_tokenize_speaks_tgi_and_vllm_by_the_body(cluster: Cluster) -> None:
    tgi = (await cluster.http.post("/tokenize", json={"inputs": "a fox"})).json()
    assert "".join(token["text"] for token in tgi) == "a fox" and tgi[-1]["stop"] == 5
    vllm = (await cluster.http.post("/tokenize", json={"prompt": "a fox", "return_token_strs": True})).json()
    assert vllm["tokens"] == [token["id"] for token in tgi] and vllm["count"] == len(tgi)
    assert "".join(vllm["token_strs"]) == "a fox" and vllm["max_model_len"] == 512
    back = await cluster.http.post("/detokenize", json={"tokens": vllm["tokens"]})
    assert back.json() == {"prompt": "a fox"}
    chat = (await cluster.http.post("/tokenize", json={"messages": MESSAGES})).json()
    templated = (await cluster.http.post("/chat_tokenize", json={"messages": MESSAGES})).json()
    assert [t["id"] for t in templated["tokenize_response"]] == chat["tokens"] and QUESTION in templated[
        "templated_text"
    ]


# ---------------------------------------------------------------- OpenAI with vLLM's fields


async def test_tokens_in_tokens_out_is_a_completion_without_its_text(cluster: Cluster) -> None:
    prompt = (await cluster.http.post("/tokenize", json={"prompt": RAW})).json()["tokens"]
    fields = {"temperature": 0, "max_tokens": 24, "logprobs": 1, "prompt_logprobs": 0}
    expected = await cluster.complete(prompt, **fields)
    body = {"token_ids": prompt, "sampling_params": fields}
    whole = (await cluster.http.post("/inference/v1/generate", json=body)).json()
    [choice], [completion] = whole["choices"], expected["choices"]
    assert choice["token_ids"] == completion["token_ids"]
    assert choice["finish_reason"] == completion["finish_reason"] and whole["usage"] == expected["usage"]
    assert whole["prompt_logprobs"] == completion["prompt_logprobs"]
    told = choice["logprobs"]["content"]
    assert [token["logprob"] for token in told] == completion["logprobs"]["token_logprobs"]
    assert [token["token"] for token in told] == [f"token_id:{i}" for i in choice["token_ids"]]
    del fields["prompt_logprobs"]
    streamed = (await cluster.http.post("/inference/v1/generate", json={**body, "stream": True})).text
    chunks = data_of(streamed.removesuffix("data: [DONE]\n\n"))
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    sentence = (await cluster.http.post("/detokenize", json={"tokens": choice["token_ids"]})).json()["prompt"]
    assert sentence.removesuffix("<|im_end|>") == completion["text"]


async def test_vllms_truncation_leaves_room_for_the_answer(cluster: Cluster) -> None:
    """The same tokens as a prompt that was cut before it was sent; both endpoints, from both sides."""
    words = [str(number) for number in range(400)]
    ids = (await cluster.http.post("/tokenize", json={"prompt": " ".join(words)})).json()["tokens"]
    common = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    async def complete(**fields: Any) -> dict[str, Any]:
        response = await cluster.http.post("/v1/completions", json={**common, **fields})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    for fields, kept in (
        ({"truncate_prompt_tokens": -1}, ids[-506:]),
        ({"truncate_prompt_tokens": 20}, ids[-20:]),
        ({"truncate_prompt_tokens": 20, "truncation_side": "right"}, ids[:20]),
    ):
        cut, before = await complete(prompt=" ".join(words), **fields), await complete(prompt=kept)
        assert len(ids) > 512 and cut["prompt_token_ids"] == kept and cut["token_ids"] == before["token_ids"]
    chat = {"messages": [{"role": "user", "content": " ".join(words)}], **common}
    assert (await cluster.http.post("/v1/chat/completions", json=chat)).status_code == 400
    answer = (await cluster.http.post("/v1/chat/completions", json={**chat, "truncate_prompt_tokens": -1})).json()
    assert answer["usage"]["prompt_tokens"] == 506 and answer["usage"]["completion_tokens"] == 6


RAG = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for d in documents or () %}{{ d.title }}: {{ d.text }}\n"
    "{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def test_a_chat_may_bring_its_template_and_documents(cluster: Cluster) -> None:
    """The same answer as to the prompt that it makes; a template that never ends is a mistake of its own request."""
    documents = [{"title": "Fact", "text": "Foxes are red."}]
    chat = {"messages": MESSAGES, "documents": documents, "chat_template": RAG}
    prompt = f"<|im_start|>user\nFact: Foxes are red.\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    templated = (await cluster.http.post("/chat_tokenize", json=chat)).json()
    assert templated["templated_text"] == prompt
    tokens = (await cluster.http.post("/tokenize", json=chat)).json()["tokens"]
    assert tokens == [t["id"] for t in templated["tokenize_response"]]
    plain = {"prompt": tokens, "max_tokens": 12, "stop": ["<|im_end|>"]}
    expected = (await cluster.http.post("/v1/completions", json=plain)).json()["choices"][0]["text"]
    ends = {"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"}
    endless = asyncio.create_task(cluster.http.post("/v1/chat/completions", json={**chat, **ends}))
    assert await openai_text(cluster, max_tokens=12, **{**chat, "messages": MESSAGES}) == expected
    asked = {"input": QUESTION, "max_output_tokens": 12, "documents": documents, "chat_template": RAG}
    response = (await cluster.http.post("/v1/responses", json=asked)).json()
    assert response["output"][0]["content"][0]["text"] == expected
    for refused in (await endless, await cluster.http.post("/tokenize", json={**chat, "chat_template": "{% if %}"})):
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template"


async def test_tokens_have_the_ids_that_their_log_probabilities_name(cluster: Cluster) -> None:
    fields = {"temperature": 0, "max_tokens": 5, "return_token_ids": True, "return_tokens_as_token_ids": True}
    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **fields}
    [choice] = (await cluster.http.post("/v1/chat/completions", json=chat)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [t["token"] for t in content] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert b"".join(bytes(t["bytes"]) for t in content).decode() == choice["message"]["content"]
    assert all(t["top_logprobs"][0]["token"] == t["token"] for t in content)
    plain = {"prompt": "a fox", "echo": True, "logprobs": 0, **fields}
    [choice] = (await cluster.http.post("/v1/completions", json=plain)).json()["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]


async def test_the_operator_bounds_log_probabilities(cluster: Cluster) -> None:
    for path, fields, name in (
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}, "top_logprobs"),
        ("/v1/completions", {"prompt": "a fox"}, "logprobs"),
        ("/v1/completions", {"prompt": "a fox"}, "prompt_logprobs"),
        ("/v1/responses", {"input": QUESTION}, "top_logprobs"),
    ):
        limit = {"max_output_tokens" if path.endswith("responses") else "max_tokens": 16}
        whole, refused = [await cluster.http.post(path, json={**fields, **limit, name: number}) for number in (25, 26)]
        assert whole.status_code == 200 and refused.status_code == 400, path
        assert refused.json()["error"]["param"] == name and "--max-logprobs" in refused.json()["error"]["message"]
        if "messages" in fields:
            [first, *_] = whole.json()["choices"][0]["logprobs"]["content"]
            assert len({top["logprob"] for top in first["top_logprobs"]}) > 20


async def test_sampling_defaults_are_the_models_for_openai_and_anthropic_alone(cluster: Cluster) -> None:
    """The cluster's is temperature 0; TGI draws because it is told to, Ollama because its default is 0.8."""

    async def texts(path: str, body: dict[str, Any], *keys: Any, put: Any = None) -> list[str]:
        found = []
        for seed in range(5):
            seeded = {**body, "seed": seed} if put is None else {**body, put: {**body[put], "seed": seed}}
            answer = (await cluster.http.post(path, json=seeded)).json()
            for key in keys:
                answer = answer[key]
            found.append(answer)
        return found

    story, size = "Once upon a time", {"max_tokens": 16}
    plain = ("choices", 0, "text")
    [greedy] = set(await texts("/v1/completions", {"prompt": story, **size}, *plain))
    assert [greedy] * 5 == await texts("/v1/completions", {"prompt": story, **size, "temperature": 0}, *plain)
    assert len(set(await texts("/v1/completions", {"prompt": story, **size, "temperature": 1}, *plain))) > 1
    sampled = {"inputs": story, "parameters": {"do_sample": True, "max_new_tokens": 16}}
    assert len(set(await texts("/generate", sampled, "generated_text", put="parameters"))) > 1
    ollamas = {"model": "demo", "prompt": story, "raw": True, "stream": False, "options": {"num_predict": 16}}
    assert len(set(await texts("/api/generate", ollamas, "response", put="options"))) > 1
    asked = [{"role": "user", "content": "Tell me a story."}]
    expected = await openai_text(cluster, asked, **size)
    for path, body, keys in (
        ("/v1/chat/completions", {"messages": asked, **size}, ("choices", 0, "message", "content")),
        ("/v1/messages", {"model": "demo", "messages": asked, **size}, ("content", 0, "text")),
        ("/v1/responses", {"input": asked, "max_output_tokens": 16}, ("output", 0, "content", 0, "text")),
    ):
        assert set(await texts(path, body, *keys)) == {expected}, path


# ---------------------------------------------------------------- Ollama


async def test_the_ollama_client_chats_and_streams(cluster: Cluster, ollama_client: ollama.AsyncClient) -> None:
    client = ollama_client
    options = {"temperature": 0, "num_predict": 24}
    answer = await client.chat("demo", messages=MESSAGES, options=options)
    assert answer.message.content == await openai_text(cluster) and answer.done and answer.done_reason == "stop"
    assert answer.model == "demo" and min(answer.total_duration, answer.load_duration, answer.eval_duration) > 0  # type: ignore[type-var]
    assert answer.eval_count and answer.prompt_eval_count
    parts = [part async for part in await client.chat("demo:latest", messages=MESSAGES, options=options, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == answer.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == answer.eval_count


async def test_the_ollama_client_generates_and_goes_on_from_the_context(
    cluster: Cluster, ollama_client: ollama.AsyncClient
) -> None:
    client, options = ollama_client, {"temperature": 0}
    first = await client.generate("demo", QUESTION, options=options)
    assert first.response == await openai_text(cluster)
    assert first.context and len(first.context) == (first.prompt_eval_count or 0) + (first.eval_count or 0)
    second = await client.generate("demo", "Count from 3 to 9.", context=first.context, options=options)
    assert (second.prompt_eval_count or 0) > len(first.context) and second.response
    raw = await client.generate("demo", RAW, raw=True, options=options)
    assert raw.response == "3, 4, 5, 6, 7, 8, 9." and raw.context is None


async def test_ollama_continues_what_the_client_has_begun(cluster: Cluster) -> None:
    said = [{"role": "user", "content": "Count from 3 to 9."}, {"role": "assistant", "content": "3, 4, 5,"}]
    body = {"model": "demo", "messages": said, "stream": False, "options": {"temperature": 0}}
    assert (await cluster.http.post("/api/chat", json=body)).json()["message"]["content"] == " 6, 7, 8, 9."


async def test_ollama_describes_what_is_served(cluster: Cluster, ollama_client: ollama.AsyncClient) -> None:
    client = ollama_client
    [listed] = (await client.list()).models
    assert listed.model == "demo:latest" and len(listed.digest or "") == 64 and (listed.size or 0) > 4_000_000
    shown = await client.show("demo")
    assert shown.modelinfo and shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 512 and "completion" in (shown.capabilities or ())
    assert [m.model for m in (await client.ps()).models] == ["demo:latest"]
    assert (await cluster.http.get("/")).text == "Ollama is running"
    assert (await cluster.http.head("/")).status_code == 200
    assert tuple(map(int, (await cluster.http.get("/api/version")).json()["version"].split("."))) > (0, 5, 0)


async def test_ollama_examples_post_json_as_a_form(cluster: Cluster) -> None:
    data = json.dumps({"model": "demo", "prompt": QUESTION, "stream": False, "options": {"temperature": 0}})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await cluster.http.post("/api/generate", content=data, headers=headers)
    assert response.json()["response"] == await openai_text(cluster)


async def test_ollama_loads_and_unloads_in_words(cluster: Cluster) -> None:
    for body, reason in (({}, "load"), ({"keep_alive": 0}, "unload"), ({"keep_alive": "5m"}, "load")):
        for path in ("/api/generate", "/api/chat"):
            response = await cluster.http.post(path, json={"model": "demo", "stream": False, **body})
            assert response.json()["done_reason"] == reason
            assert ("keep_alive" in response.headers.get("x-pagewire-ignored-fields", "")) == bool(body)


async def test_ollama_cuts_what_does_not_fit_and_says_so(cluster: Cluster) -> None:
    client = cluster.http
    messages = [{"role": "system", "content": "Be short."}]
    messages += [{"role": "user", "content": f"word {i} " * 20} for i in range(40)] + MESSAGES
    body = {"model": "demo", "messages": messages, "stream": False, "options": {"temperature": 0, "num_predict": 8}}
    cut = await client.post("/api/chat", json=body)
    assert cut.status_code == 200 and cut.json()["prompt_truncated"] > 10
    assert cut.headers["x-pagewire-prompt-truncated"] == str(cut.json()["prompt_truncated"])
    assert cut.json()["prompt_eval_count"] <= 504
    whole = await client.post("/api/chat", json={**body, "truncate": False})
    assert whole.status_code == 400 and "context length" in whole.json()["error"]
    small = await client.post("/api/generate", json={**body, "prompt": "word " * 100, "options": {"num_ctx": 64}})
    assert small.json()["prompt_eval_count"] + 1 == 64


async def test_ollama_answers_a_prompt_that_fits_however_long_the_answer_may_be(cluster: Cluster) -> None:
    """num_ctx and num_predict of the same size once cut the prompt to one token; more of the latter was a 400."""
    body = {"model": "demo", "prompt": RAW, "raw": True, "stream": False}
    for options in ({"num_ctx": 512, "num_predict": 512}, {"num_predict": 4096}):
        for fields in ({}, {"truncate": False}):
            asked = {**body, **fields, "options": {"temperature": 0, **options}}
            answer = (await cluster.http.post("/api/generate", json=asked)).json()
            assert answer["response"] == "3, 4, 5, 6, 7, 8, 9." and "prompt_truncated" not in answer


async def test_ollamas_penalties_are_over_the_last_tokens(cluster: Cluster) -> None:
    """Of none: no penalty. Over more of them the prompt counts, in which what it is to write stands already."""

    async def write(**options: Any) -> str:
        body = {"model": "demo", "prompt": RAW, "raw": True, "stream": False, "options": {"temperature": 0, **options}}
        response = await cluster.http.post("/api/generate", json=body)
        assert "repeat_last_n" not in response.headers.get("x-pagewire-ignored-fields", "")
        return str(response.json()["response"])

    plain = await write()
    assert plain == "3, 4, 5, 6, 7, 8, 9." == await write(repeat_penalty=9.0, repeat_last_n=0)
    texts = [await write(repeat_penalty=9.0, repeat_last_n=n, num_predict=16) for n in (1, 64, -1)]
    assert plain not in texts and texts[0] != texts[1]
    assert await write(repeat_penalty=9.0, num_predict=16) == texts[1]


async def test_ollama_errors_are_sentences(cluster: Cluster, ollama_client: ollama.AsyncClient) -> None:
    missing = await cluster.http.post("/api/chat", json={"model": "none", "messages": MESSAGES})
    assert missing.status_code == 404 and "not found" in missing.json()["error"]
    for body in ({"prompt": "x"}, {"model": "demo", "prompt": 3}, {"model": "demo", "prompt": "x", "think": True}):
        response = await cluster.http.post("/api/generate", json=body)
        assert response.status_code == 400 and isinstance(response.json()["error"], str)
    with pytest.raises(ollama.ResponseError) as raised:
        await ollama_client.show("none")
    assert raised.value.status_code == 404


async def test_ollamas_formats_are_followed(cluster: Cluster, ollama_client: ollama.AsyncClient) -> None:
    options = {"temperature": 0, "num_predict": 80}
    answer = await ollama_client.chat("demo", messages=MESSAGES, format=PERSON, options=options)
    jsonschema.validate(json.loads(answer.message.content or ""), PERSON)
    raw = await ollama_client.generate("demo", RAW, raw=True, format="json", options=options)
    assert isinstance(json.loads(raw.response), dict)
    bad = await cluster.http.post("/api/chat", json={"model": "demo", "messages": MESSAGES, "format": "yaml"})
    assert bad.status_code == 400 and "format" in bad.json()["error"]


async def test_ollamas_client_gets_calls_of_tools_with_objects(ollama_client: ollama.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": WEATHER}}
    asked: dict[str, Any] = {"messages": ASK_WEATHER, "tools": [tool], "options": {"temperature": 0}}
    answer = await ollama_client.chat("demo", **asked)
    [call] = answer.message.tool_calls or ()
    assert call.function.name == "get_weather" and set(call.function.arguments) == {"city", "unit"}
    parts = [part async for part in await ollama_client.chat("demo", **asked, stream=True)]
    [streamed] = [c for part in parts for c in part.message.tool_calls or ()]
    assert streamed.function == call.function and parts[-1].done_reason == "stop"
    said = {"role": "assistant", "content": "", "tool_calls": [{"function": call.function.model_dump()}]}
    told = [*ASK_WEATHER, said, {"role": "tool", "tool_name": "get_weather", "content": "sunny"}]
    after = await ollama_client.chat("demo", messages=told, tools=[tool], options={"temperature": 0})
    assert after.done and (after.prompt_eval_count or 0) > (answer.prompt_eval_count or 0)


# ---------------------------------------------------------------- Anthropic


def anthropic_client(cluster: Cluster) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=cluster.base_url, api_key="unused", max_retries=0)


async def test_the_anthropic_client_gets_a_message(cluster: Cluster) -> None:
    async with anthropic_client(cluster) as client:
        message = await client.messages.create(
            model="demo", max_tokens=24, extra_body=GREEDY, system=[{"type": "text", "text": "Be kind."}],
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        )  # fmt: skip
        system = [{"role": "system", "content": "Be kind."}]
        [block] = message.content
        assert block.type == "text" and block.text == await openai_text(cluster, system + MESSAGES)
        assert message.stop_reason == "end_turn" and message.stop_sequence is None and message.role == "assistant"
        counted = await client.messages.count_tokens(
            model="demo", system="Be kind.", messages=[{"role": "user", "content": QUESTION}]
        )
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


async def test_the_anthropic_client_streams_events_in_order(cluster: Cluster) -> None:
    async with anthropic_client(cluster) as client:
        request: dict[str, Any] = {"model": "demo", "max_tokens": 24, "extra_body": GREEDY, "messages": MESSAGES}
        async with client.messages.stream(**request) as stream:
            kinds = [event.type async for event in stream if event.type in _WIRE_EVENTS]
            final = await stream.get_final_message()
        whole = await client.messages.create(**request)
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


_WIRE_EVENTS = (
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop",
)  # fmt: skip


async def test_anthropic_stop_reasons(cluster: Cluster) -> None:
    async with anthropic_client(cluster) as client:
        request: dict[str, Any] = {"model": "demo", "extra_body": GREEDY, "messages": MESSAGES}
        stopped = await client.messages.create(**request, max_tokens=24, stop_sequences=["Tokyo"])
        assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "Tokyo"
        cut = await client.messages.create(**request, max_tokens=2)
        assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
        begun = [*MESSAGES, {"role": "assistant", "content": "The capital of"}]
        continued = await client.messages.create(model="demo", max_tokens=24, extra_body=GREEDY, messages=begun)  # type: ignore[arg-type]
        assert continued.content[0].text.strip() == "Japan is Tokyo."  # type: ignore[union-attr]


async def test_anthropic_tools_are_blocks_whole_and_streamed(cluster: Cluster) -> None:
    tool = {"name": "get_weather", "description": "weather", "input_schema": WEATHER}
    request: dict[str, Any] = {"model": "demo", "max_tokens": 80, "tools": [tool], "extra_body": GREEDY}
    async with anthropic_client(cluster) as client:
        for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}):
            message = await client.messages.create(**request, messages=ASK_WEATHER, tool_choice=choice)
            block = message.content[-1]
            assert block.type == "tool_use" and block.name == "get_weather" and message.stop_reason == "tool_use"
            jsonschema.validate(block.input, WEATHER)
            async with client.messages.stream(**request, messages=ASK_WEATHER, tool_choice=choice) as stream:
                streamed = (await stream.get_final_message()).content[-1]
            assert streamed.type == "tool_use" and streamed.input == block.input
        used = {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}
        result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
        answers = [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
        told: Any = [*ASK_WEATHER, *answers]
        after = await client.messages.create(**request, messages=told)
        assert after.stop_reason in ("end_turn", "tool_use", "max_tokens")
        counted = await client.messages.count_tokens(model="demo", messages=told, tools=[tool])  # type: ignore[list-item]
        assert counted.input_tokens == after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0)


async def anthropic_message(cluster: Cluster, **fields: Any) -> httpx.Response:
    body = {"model": "demo", "max_tokens": 24, "messages": MESSAGES, **GREEDY, **fields}
    return await cluster.http.post("/v1/messages", json=body)


@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 9}, {"type": "adaptive"}])
async def test_anthropic_thinking_of_a_model_that_does_not_is_ignored_and_told(
    cluster: Cluster, thinking: dict[str, Any]
) -> None:
    """Coding agents ask whatever model they are given to think."""
    plain = await anthropic_message(cluster)
    asked = await anthropic_message(cluster, thinking=thinking, output_config={"effort": "max"})
    assert asked.json()["content"] == plain.json()["content"]
    assert asked.headers["x-pagewire-ignored-fields"] == "output_config.effort,thinking"
    assert "x-pagewire-ignored-fields" not in plain.headers


async def test_anthropic_thinking_that_is_wrong_is_refused(cluster: Cluster) -> None:
    for wrong in ({"type": "deep"}, {"type": "enabled", "budget_tokens": 0}, {"type": "enabled", "display": "all"}):
        response = await anthropic_message(cluster, thinking=wrong)
        assert response.status_code == 400 and "thinking" in response.json()["error"]["message"]
    response = await anthropic_message(cluster, output_config={"effort": "none"})
    assert response.status_code == 400 and "output_config.effort" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["output_config", "output_format"])
async def test_anthropic_output_formats_are_followed(cluster: Cluster, name: str) -> None:
    def field(schema: dict[str, Any]) -> dict[str, Any]:
        form = {"type": "json_schema", "schema": schema}
        return {name: {"format": form} if name == "output_config" else form}

    answer = (await anthropic_message(cluster, max_tokens=80, **field(PERSON))).json()
    jsonschema.validate(json.loads(answer["content"][0]["text"]), PERSON)
    assert answer["stop_reason"] == "end_turn"
    refused = await anthropic_message(cluster, **field({"type": "no such type"}))
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


async def test_anthropic_answers_may_fill_the_context(cluster: Cluster) -> None:
    """Coding agents ask for as many tokens as any model gives; the prompt alone has to fit."""
    assert (await anthropic_message(cluster, max_tokens=100_000)).json()["stop_reason"] == "end_turn"
    endless = {"type": "json_schema", "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1000}}
    answer = (await anthropic_message(cluster, max_tokens=100_000, output_config={"format": endless})).json()
    usage = answer["usage"]
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] == 512
    cut = (await anthropic_message(cluster, max_tokens=9, output_config={"format": endless})).json()
    assert cut["stop_reason"] == "max_tokens" and cut["usage"]["output_tokens"] == 9


async def test_anthropic_documents_and_search_results_are_text(cluster: Cluster) -> None:
    blocks = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A"}, "title": "T"},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "B"}]}},
        {"type": "search_result", "source": "S", "title": "R", "content": [{"type": "text", "text": "C"}]},
        {"type": "text", "text": QUESTION},
    ]

    async def count(messages: list[dict[str, Any]]) -> int:
        body = {"model": "demo", "messages": messages}
        counted = await cluster.http.post("/v1/messages/count_tokens", json=body)
        return int(counted.json()["input_tokens"])

    written = f"T\nA\n\nB\n\nR\nS\nC\n\n{QUESTION}"
    later = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for content in (blocks, written):
        told = [{"role": "user", "content": content}, later]
        answer = await anthropic_message(cluster, messages=told)
        assert answer.status_code == 200, answer.text
        prompt = answer.json()["usage"]["input_tokens"] + answer.json()["usage"]["cache_read_input_tokens"]
        assert await count(told) == prompt == await count([{"role": "user", "content": written}, later])
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
    refused = await anthropic_message(cluster, messages=[{"role": "user", "content": [pdf]}])
    assert refused.status_code == 400 and "'base64'" in refused.json()["error"]["message"]


async def test_anthropic_documents_are_in_no_document(cluster: Cluster) -> None:
    """However deep the JSON is."""
    for depth in (1, 30):
        nested = '{"type":"document","source":{"type":"content","content":[' * (depth + 1) + "]}}" * (depth + 1)
        body = f'{{"model":"demo","max_tokens":1,"messages":[{{"role":"user","content":[{nested}]}}]}}'
        refused = await cluster.http.post("/v1/messages", content=body)
        assert refused.status_code == 400 and "'document'" in refused.json()["error"]["message"]


async def test_the_anthropic_client_lists_the_models(cluster: Cluster) -> None:
    """At the path of OpenAI's list, which has the keys of both."""
    async with anthropic_client(cluster) as client:
        listed = [model async for model in client.models.list()]
        assert listed == [await client.models.retrieve("demo")]
    [model] = listed
    assert (model.id, model.display_name, model.type, model.max_input_tokens) == ("demo", "demo", "model", 512)
    assert abs((datetime.now(UTC) - model.created_at).total_seconds()) < 3600


async def test_anthropic_errors_have_its_shape(cluster: Cluster) -> None:
    async with anthropic_client(cluster) as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="none", max_tokens=2, messages=MESSAGES)  # type: ignore[arg-type]
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError) as long:
            await client.messages.create(
                model="demo", max_tokens=8, messages=[{"role": "user", "content": "a b " * 600}]
            )
        assert "prompt is too long" in long.value.message
    for body in ({"model": "demo", "messages": MESSAGES}, {"model": "demo", "max_tokens": 1, "messages": []}):
        response = await cluster.http.post("/v1/messages", json=body)
        assert response.status_code == 400
        assert response.json()["type"] == "error" and response.json()["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------- Node

NODE = Path(__file__).parents[1] / "node"


@pytest.mark.skipif(not shutil.which("node"), reason="no Node: install Node.js 20 or newer with npm")
@pytest.mark.skipif(not (NODE / "node_modules").exists(), reason="no clients for Node: npm ci --prefix tests/node")
@pytest.mark.parametrize("client", ["openai", "ollama"])
async def test_clients_for_node(cluster: Cluster, client: str) -> None:
    """What is tested is in tests/node, in the clients' own language."""
    environment = os.environ | {"BASE_URL": cluster.base_url}
    process = await asyncio.create_subprocess_exec(
        "node", "--test", f"{client}.test.mjs", cwd=NODE, env=environment, stdout=PIPE, stderr=STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
