"""OpenAI's Responses API through every service, with the official client, on one cluster with two bridges."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from openai import AsyncOpenAI
from pagewire_cli.serve import demo_model
from pagewire_core.redis_link import open_redis
from processes import free_port
from pydantic import BaseModel, Field
from response_events import read_back

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=512", "--threads=1")
QUESTION = "What is the capital of Japan?"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_output_tokens": 24}
TTL_S = 3600


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("responses")
    tools = ("--tool-call-parser=json", "--enable-auto-tool-choice", f"--response-store-ttl={TTL_S}")
    made = Cluster(demo_model(), directory, worker_flags=FLAGS, router_flags=("--served-model-name=demo", *PAIRS),
                   bridge_flags=tools, with_faults=True)  # fmt: skip
    async with running(made) as started:
        started.add_bridge("bridge-other", free_port())
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """At the other bridge."""
    url = f"http://{cluster.processes['bridge-other'].address}"
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=5) as made:
        yield made


async def chat_text(client: AsyncOpenAI, *messages: tuple[str, str]) -> str | None:
    said: Any = [{"role": role, "content": content} for role, content in messages]
    answer = await client.chat.completions.create(model="demo", temperature=0, max_tokens=24, messages=said)
    return answer.choices[0].message.content


async def test_a_response_says_what_the_chat_says_whole_and_streamed(client: AsyncOpenAI) -> None:
    whole = await client.responses.create(**GREEDY, input=QUESTION, instructions="Be kind.")
    assert whole.output_text == await chat_text(client, ("system", "Be kind."), ("user", QUESTION)) != ""
    assert whole.status == "completed" and whole.usage and whole.usage.total_tokens > whole.usage.output_tokens > 1
    async with client.responses.stream(**GREEDY, input=QUESTION, instructions="Be kind.") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == whole.output_text and final.usage and final.usage.input_tokens_details.cached_tokens > 0
    raw = [event.to_dict() async for event in await client.responses.create(**GREEDY, input=QUESTION, stream=True)]
    assert len([event for event in raw if event["type"].endswith("text.delta")]) > 1
    assert read_back(raw)["output"][0]["content"][0]["text"] == await chat_text(client, ("user", QUESTION))


async def test_a_conversation_goes_on_at_another_bridge(
    cluster: Cluster, client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    """What is stored is in Redis, for a time, and gone when it is deleted."""
    ask = GREEDY | {"instructions": "Be kind, and answer in one sentence. " * 3}
    first = await client.responses.create(**ask, input=QUESTION)
    assert (await other.responses.retrieve(first.id)).model_dump() == first.model_dump()
    second = await other.responses.create(**ask, input="And of France?", previous_response_id=first.id)
    counted = await other.responses.input_tokens.count(
        model="demo", instructions=ask["instructions"], input="And of France?", previous_response_id=first.id
    )
    assert second.usage and counted.input_tokens == second.usage.input_tokens
    turns = (("user", QUESTION), ("assistant", first.output_text), ("user", "And of France?"))
    assert second.output_text == await chat_text(client, ("system", ask["instructions"]), *turns)
    assert second.usage.input_tokens_details.cached_tokens > 0
    items = await client.responses.input_items.list(second.id, order="asc")
    assert [item.content[0].text for item in items.data] == [turn[1] for turn in turns]  # type: ignore[union-attr]
    async with open_redis(cluster.redis_url) as redis:
        keys = await redis.keys("pw:response:*")
        assert any(first.id.encode() in key for key in keys)
        assert all([0 < await redis.ttl(key) <= TTL_S for key in keys])
        await other.responses.delete(first.id)
        assert not await redis.keys(f"pw:response:*{first.id}*")
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


async def test_a_named_conversation_goes_on_at_another_bridge(client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    """Each answer is what the chat of all turns says, and is one of the next one's turns."""
    said = ("user", "My name is Ada.")
    made = await client.conversations.create(items=[{"type": "message", "role": said[0], "content": said[1]}])  # type: ignore[list-item]
    first = await other.responses.create(**GREEDY, input=QUESTION, conversation=made.id)
    turns = [said, ("user", QUESTION)]
    assert first.output_text == await chat_text(client, *turns)
    stream = await client.responses.create(**GREEDY, input="And of France?", conversation=made.id, stream=True)
    second = [event async for event in stream][-1].response  # type: ignore[union-attr]
    turns += [("assistant", first.output_text), ("user", "And of France?")]
    assert second.output_text == await chat_text(client, *turns)
    items = [item async for item in other.conversations.items.list(made.id, order="asc")]
    assert [(i.role, i.content[0].text) for i in items] == [*turns, ("assistant", second.output_text)]  # type: ignore[union-attr]
    await other.conversations.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(**GREEDY, input="x", conversation=made.id)


class get_weather(BaseModel):
    city: str = Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


async def test_tools_are_called_and_told_their_results(client: AsyncOpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(get_weather, description="weather")
    flat: Any = {"type": "function", **tool["function"]}
    ask = {**GREEDY, "max_output_tokens": 100, "tools": [flat], "input": "Call get_weather for Rome in celsius."}
    for choice in ("auto", "required", {"type": "function", "name": "get_weather"}):
        whole = await client.responses.parse(**ask, tool_choice=choice)
        [call] = whole.output
        assert call.type == "function_call" and get_weather.model_validate_json(call.arguments)
        raw = [e.to_dict() async for e in await client.responses.create(**ask, tool_choice=choice, stream=True)]
        [streamed] = read_back(raw)["output"]
        assert (streamed["name"], streamed["arguments"]) == ("get_weather", call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = await client.responses.create(**GREEDY, input=[result], previous_response_id=whole.id)
    assert after.status in ("completed", "incomplete") and after.usage and whole.usage
    assert after.usage.input_tokens > 10


SUM = {"type": "grammar", "syntax": "lark", "definition": 'start: "\\"" N ("\\n+ " N){1,2} "\\""\nN: /[1-9][0-9]{0,2}/'}


async def test_a_custom_tool_is_given_a_text_that_follows_its_grammar(client: AsyncOpenAI) -> None:
    custom: Any = {"type": "custom", "name": "calculate", "description": "sums", "format": SUM}
    ask: dict[str, Any] = {"model": "demo", "max_output_tokens": 60, "tools": [custom], "input": "What is 1 + 2?"}
    for choice in ("required", {"type": "custom", "name": "calculate"}):
        for seed in range(3):
            extra = {"extra_body": {"seed": seed}, "temperature": 1, "tool_choice": choice}
            whole = await client.responses.create(**ask, **extra)
            [call] = whole.output
            assert call.type == "custom_tool_call" and re.fullmatch(
                r'"[1-9]\d{0,2}(\n\+ [1-9]\d{0,2}){1,2}"', call.input
            )
            raw = [e.to_dict() async for e in await client.responses.create(**ask, **extra, stream=True)]
            assert [item["input"] for item in read_back(raw)["output"]] == [call.input]
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "3"}
    stored = await client.responses.create(**GREEDY, input=[result], previous_response_id=whole.id)
    sent: Any = [{"role": "user", "content": ask["input"]}, call.model_dump(), result]
    again = await client.responses.create(**GREEDY, input=sent, store=False)
    assert again.output_text == stored.output_text and again.usage and stored.usage
    assert again.usage.input_tokens == stored.usage.input_tokens
    custom["format"] = {**SUM, "definition": "start: ("}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**ask, tool_choice="required")
    assert refused.value.param == "tools"


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(le=150, ge=0)


async def test_a_text_has_the_form_that_was_asked_for(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "temperature": 1, "max_output_tokens": 100, "input": "Who?"}
    for seed in range(3):
        parsed = await client.responses.parse(**asked, text_format=Person, extra_body={"seed": seed})
        assert parsed.output_parsed is not None and 0 <= parsed.output_parsed.age <= 150
        async with client.responses.stream(**asked, text_format=Person, extra_body={"seed": seed}) as stream:
            assert (await stream.get_final_response()).output_parsed == parsed.output_parsed


async def test_an_answer_that_is_cut_is_incomplete(client: AsyncOpenAI) -> None:
    cut = await client.responses.create(
        model="demo", temperature=0, input=QUESTION, max_output_tokens=2, top_logprobs=2,
        include=["message.output_text.logprobs"],
    )  # fmt: skip
    assert cut.status == "incomplete" and cut.incomplete_details and cut.usage and cut.usage.output_tokens == 2
    assert cut.incomplete_details.reason == "max_output_tokens"
    [message] = cut.output
    assert message.type == "message" and message.status == "incomplete"
    part = message.content[0]
    assert part.type == "output_text" and part.logprobs and len(part.logprobs) == 2
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


async def test_a_conversation_that_is_too_long_is_refused_or_cut(client: AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "Count from 3 to 9. " * 20}, {"role": "assistant", "content": "No."}] * 4
    ask: dict[str, Any] = {**GREEDY, "input": [*long, {"role": "user", "content": QUESTION}]}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**ask)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "input"
    cut = await client.responses.with_raw_response.create(**ask, truncation="auto")
    assert int(cut.headers["x-pagewire-prompt-truncated"]) > 0
    assert cut.parse().status == "completed"
    fits = await client.responses.with_raw_response.create(
        model="demo", temperature=0, input=QUESTION, max_output_tokens=4096, truncation="auto"
    )
    assert "x-pagewire-prompt-truncated" not in fits.headers
    assert fits.parse().output_text == await chat_text(client, ("user", QUESTION))


LONG: dict[str, Any] = {"model": "demo", "temperature": 0, "input": QUESTION, "background": True,
                        "extra_body": {"ignore_eos": True}}  # fmt: skip


async def test_a_background_response_is_found_and_streamed_at_another_bridge(
    client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    begun = await client.responses.create(**GREEDY, input=QUESTION, background=True)
    while (done := await other.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        await asyncio.sleep(0.02)
    assert done.status == "completed" and done.output_text == await chat_text(client, ("user", QUESTION))
    stream = await client.responses.create(**LONG, max_output_tokens=60, stream=True)
    begin: list[Any] = []
    async for event in stream:
        begin.append(event.to_dict())
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    name, after = begin[0]["response"]["id"], begin[-1]["sequence_number"]
    rest = [e.to_dict() async for e in await other.responses.retrieve(name, stream=True, starting_after=after)]
    final = read_back([*begin, *rest])
    assert final["status"] == "incomplete" and final["usage"]["output_tokens"] == 60
    assert (await client.responses.retrieve(name)).to_dict() == final


async def test_a_background_response_is_cancelled_from_another_bridge(
    cluster: Cluster, client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    with cluster.slow_steps(0.05):
        begun = await client.responses.create(**LONG, max_output_tokens=480)

        async def runs() -> bool:  # the answer does not wait for it on a busy machine
            return (await cluster.status()).running_requests == 1

        await cluster.until(runs, "it does not run")
        assert (await other.responses.cancel(begun.id)).status == "cancelled"
    await cluster.settle()  # long before 480 tokens
    assert (await client.responses.retrieve(begun.id)).status == "cancelled"


async def test_a_bridge_that_is_stopped_fails_what_it_runs(
    cluster: Cluster, client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    with cluster.slow_steps(0.05):
        begun = await other.responses.create(**LONG, max_output_tokens=480)
        assert cluster.processes["bridge-other"].stop() == 0
    failed = await client.responses.retrieve(begun.id)
    assert failed.status == "failed" and failed.error and failed.error.code == "server_error"
