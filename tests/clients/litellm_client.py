"""LiteLLM on the running system at BASE_URL, which serves the demo model as `demo`, through three of its APIs."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks the network

import litellm
import pytest

URL = os.environ["BASE_URL"]
MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan is Tokyo."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"model": "openai/demo", "api_base": f"{URL}/v1", "api_key": "unused"},
    "vllm": {"model": "hosted_vllm/demo", "api_base": f"{URL}/v1"},
    "ollama": {"model": "ollama_chat/demo", "api_base": URL},
    "anthropic": {"model": "anthropic/demo", "api_base": URL, "api_key": "unused"},
}


@pytest.fixture(params=list(PROVIDERS))
def provider(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**PROVIDERS[request.param], "temperature": 0, "max_tokens": 24, "num_retries": 0}


def test_a_chat_is_the_same_whole_and_streamed(provider: dict[str, Any]) -> None:
    whole = litellm.completion(**provider, messages=MESSAGES)
    assert whole.choices[0].message.content == ANSWER and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
    chunks = list(
        litellm.completion(**provider, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.content == ANSWER
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_a_call_of_a_tool_is_the_same_whole_and_streamed(provider: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        **provider,
        "max_tokens": 80,
        "messages": [{"role": "user", "content": "Call get_weather for Rome in celsius."}],
        "tools": [TOOL],
        "tool_choice": "required",
    }
    if provider["model"].startswith("ollama"):
        del asked["tool_choice"]  # Ollama's API has none
    [call] = litellm.completion(**asked).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city", "unit"}
    chunks = list(litellm.completion(**asked, stream=True))
    [streamed] = litellm.stream_chunk_builder(chunks, messages=asked["messages"]).choices[0].message.tool_calls
    assert streamed.function.name == "get_weather"
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_errors_are_of_the_clients_own_classes(provider: dict[str, Any]) -> None:
    unknown = provider["model"].replace("demo", "none")
    with pytest.raises((litellm.NotFoundError, litellm.APIConnectionError)) as missing:
        litellm.completion(**{**provider, "model": unknown}, messages=MESSAGES)
    assert "none" in str(missing.value)
    if not provider["model"].startswith("ollama"):  # where what does not fit is cut
        with pytest.raises(litellm.BadRequestError):
            wrong = {"temperature": 2} if provider["model"].startswith("anthropic") else {"max_tokens": 100_000}
            litellm.completion(**{**provider, **wrong}, messages=MESSAGES)


def test_a_prompt_that_is_too_long_is_known_as_such() -> None:
    """By its words: LiteLLM falls back to another model on it."""
    long = [{"role": "user", "content": "word " * 2000}]
    for name in ("openai", "vllm", "anthropic"):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**PROVIDERS[name], messages=long, max_tokens=4, num_retries=0)


def test_a_form_is_followed() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["age"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = litellm.completion(**PROVIDERS["openai"], messages=MESSAGES, response_format=form, max_tokens=60)
    assert isinstance(json.loads(answer.choices[0].message.content)["age"], int)


def test_plain_completions_embeddings_and_rankings() -> None:
    openai = {"api_base": f"{URL}/v1", "api_key": "unused"}
    text = litellm.text_completion(model="text-completion-openai/demo", prompt="Once", max_tokens=4, **openai)
    assert text.choices[0].text and text.usage.completion_tokens == 4
    vectors = litellm.embedding(model="openai/demo", input=["Tokyo", "a fox"], encoding_format="float", **openai)
    assert len(vectors.data) == 2 and len(vectors.data[0]["embedding"]) > 8
    ranking = litellm.rerank(model="hosted_vllm/demo", query="Tokyo", documents=["Tokyo", "a fox"], api_base=URL)
    assert ranking.results[0]["index"] == 0


async def _streamed() -> str:
    stream = await litellm.acompletion(
        **PROVIDERS["openai"], messages=MESSAGES, temperature=0, max_tokens=24, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def test_the_asynchronous_client_streams_as_well() -> None:
    import asyncio

    assert asyncio.run(_streamed()) == ANSWER
