"""Structured output through every service: valid text from a model that knows nothing, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from hypothesis import HealthCheck, given, settings
from json_schemas import instance_of, schemas
from jsonschema import Draft202012Validator
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel, Field

FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=64", "--threads=1")
pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 999},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 3, "maxItems": 4},
    },
    "required": ["on", "n", "words"], "additionalProperties": False,
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


class Pet(BaseModel):
    kind: str = Field(max_length=8)
    age: int = Field(ge=0, le=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(llama, tmp_path_factory.mktemp("structured"), worker_flags=FLAGS, router_flags=PAIRS)
    async with running(made) as cluster:
        yield cluster


def client(cluster: Cluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0)


async def chat(cluster: Cluster, **body: Any) -> dict[str, Any]:
    response = await cluster.http.post("/v1/chat/completions", json={"messages": ASK, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_official_client_parses_what_a_random_model_says(shared: Cluster, llama: Path) -> None:
    """Several choices with seeds and log probabilities; the first token is the prefill worker's."""
    async with client(shared) as openai:
        for temperature in (0.0, 1.0):
            answer = await openai.chat.completions.parse(
                model=str(llama), messages=ASK, response_format=Pet, temperature=temperature, seed=1, n=2,
                logprobs=True, top_logprobs=2,
            )  # fmt: skip
            for choice in answer.choices:
                assert isinstance(choice.message.parsed, Pet) and choice.finish_reason == "stop"
                assert b"".join(bytes(t.bytes) for t in choice.logprobs.content[:-1]).decode() == choice.message.content
        async with openai.chat.completions.stream(
            model=str(llama), messages=ASK, response_format=Pet, temperature=0, seed=1
        ) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        whole = await openai.chat.completions.parse(model=str(llama), messages=ASK, response_format=Pet, temperature=0)
        assert streamed.parsed == whole.choices[0].message.parsed
        assert streamed.content == whole.choices[0].message.content


@pytest.mark.parametrize(("wanted", "pattern"), [
    ({"regex": r"[a-f]{3}-\d{2,4}"}, r"[a-f]{3}-\d{2,4}"),
    ({"choice": ["north", "south"]}, "north|south"),
    ({"grammar": 'root ::= "SELECT " ("a" | "b") " FROM " [xy]{2,3}'}, "SELECT [ab] FROM [xy]{2,3}"),
    ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{2,5}/'}, "<[a-z]{2,5}>"),
    ({"json": {"enum": ["x", 7]}}, '"x"|7'),
    ({"structural_tag": {"format": {"type": "tag", "begin": "(", "end": ")", "content": {
        "type": "json_schema", "json_schema": {"type": "boolean"}}}}}, r"\((true|false)\)"),
])  # fmt: skip
async def test_other_forms(shared: Cluster, wanted: dict[str, Any], pattern: str) -> None:
    bytes_before = (await shared.metrics()).get("pagewire_kv_transfer_bytes_total", 0)
    for body in ({"temperature": 1.0, "seed": 3, "min_tokens": 3}, {"presence_penalty": 1.0, "ignore_eos": True}):
        answer = await shared.complete("some prompt", structured_outputs=wanted, max_tokens=80, **body)
        assert re.fullmatch(pattern, answer["choices"][0]["text"]), answer["choices"][0]
        assert answer["choices"][0]["finish_reason"] == "stop"
    assert (await shared.metrics())["pagewire_kv_transfer_bytes_total"] > bytes_before


async def test_forms_by_their_older_names(shared: Cluster) -> None:
    answer = await shared.complete("some prompt", guided_choice=["north", "south"], temperature=1.0, seed=3)
    assert answer["choices"][0]["text"] in ("north", "south")
    told = await chat(shared, guided_json=SCHEMA, response_format=None, seed=4, temperature=1)
    Draft202012Validator(SCHEMA).validate(json.loads(told["choices"][0]["message"]["content"]))


async def test_a_bad_form_is_refused_in_the_apis_words_and_harms_nobody(shared: Cluster, llama: Path) -> None:
    hostile = {"messages": ASK, "structured_outputs": {"regex": "(a{1000}){1000}"}}
    refused = asyncio.create_task(shared.http.post("/v1/chat/completions", json=hostile))
    others = [asyncio.create_task(chat(shared, response_format=FORMAT, seed=i, temperature=1)) for i in range(6)]
    for answer in await asyncio.gather(*others):
        Draft202012Validator(SCHEMA).validate(json.loads(answer["choices"][0]["message"]["content"]))
    assert (await refused).status_code == 400
    assert (await refused).json()["error"]["param"] == "structured_outputs"
    async with client(shared) as openai:
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "not": {}}}}
        with pytest.raises(BadRequestError) as caught:
            await openai.chat.completions.create(model=str(llama), messages=ASK, response_format=bad)  # type: ignore[call-overload]
        assert caught.value.param == "response_format" and "not" in caught.value.message
    for wanted in ({}, {"regex": "a", "choice": ["b"]}, {"guided": 1}, {"json": 3}):
        response = await shared.http.post("/v1/completions", json={"prompt": "x", "structured_outputs": wanted})
        assert response.status_code == 400, response.text


async def streamed(cluster: Cluster, **body: Any) -> list[str]:
    texts = [""] * body.get("n", 1)
    request = {"messages": ASK, "stream": True, "response_format": FORMAT, "temperature": 1.0, "max_tokens": 300} | body
    async with cluster.http.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                    assert choice["finish_reason"] in (None, "stop")
    return texts


async def test_a_document_outlives_its_decode_worker(llama: Path, tmp_path: Path) -> None:
    """Killed in the middle of four of them: each goes on as it would have, and is valid."""
    flags = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=8", "--threads=1")
    turns = ("--routing-policy=round_robin",)  # half of them are on the one that is killed
    cluster = Cluster(llama, tmp_path, prefill=1, decode=2, worker_flags=flags, router_flags=turns, with_faults=True)
    async with running(cluster):
        expected = [await streamed(cluster, seed=i, n=2) for i in range(4)]
        for texts in expected:
            for text in texts:
                Draft202012Validator(SCHEMA).validate(json.loads(text))
        (cluster.faults / "step:decode-0:kill").write_text("after=8")
        with cluster.slow_steps():  # else eight steps may be over before the client has anything to go on after
            assert await asyncio.gather(*(streamed(cluster, seed=i, n=2) for i in range(4))) == expected
        assert not cluster.processes["decode-0"].alive
        assert (await cluster.metrics())["pagewire_resumed_requests_total"] > 0


async def test_random_schemas_give_valid_instances_or_an_error(shared: Cluster) -> None:
    """A few of them; `make fuzz-schemas` tries a thousand."""
    drawn: list[Any] = []

    @settings(max_examples=15, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(schemas())
    def draw(schema: Any) -> None:
        drawn.append(schema)

    draw()
    results = await asyncio.gather(*(instance_of(shared, schema, seed) for seed, schema in enumerate(drawn)))
    assert results.count("valid") > len(drawn) / 2, results
