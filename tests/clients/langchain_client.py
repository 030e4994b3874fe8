"""langchain-openai on the running system at BASE_URL, which serves the demo model as `demo`."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings, custom_tool
from pydantic import BaseModel, Field

SERVER: dict[str, Any] = {
    "model": "demo",
    "base_url": os.environ["BASE_URL"] + "/v1",
    "api_key": "unused",
    "max_retries": 0,
}
QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."


def chat(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(**SERVER, **{"temperature": 0, "max_tokens": 24, **fields})


@tool
def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city."""
    return "sunny"


class Person(BaseModel):
    name: str = Field(max_length=16)
    age: int = Field(ge=0, le=99)


def test_a_chat_is_the_same_whole_and_streamed_and_is_accounted_for() -> None:
    whole = chat().invoke(QUESTION)
    assert whole.content == ANSWER and whole.response_metadata["finish_reason"] == "stop"
    usage = whole.usage_metadata
    assert usage and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    pieces = list(chat(stream_usage=True).stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == ANSWER
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.usage_metadata and total.usage_metadata["output_tokens"] == usage["output_tokens"]


def test_several_choices_stops_and_log_probabilities() -> None:
    result = chat(n=2, temperature=1, logprobs=True, top_logprobs=2).generate([[HumanMessage(QUESTION)]])
    assert len(result.generations[0]) == 2
    stopped = chat().invoke(QUESTION, stop=["Japan"])
    assert stopped.content == "The capital of "
    batch = chat().batch([QUESTION, [SystemMessage("Be kind."), HumanMessage(QUESTION)]])
    assert batch[0].content == ANSWER and len(batch) == 2


def test_a_tool_is_called_whole_and_streamed_and_its_result_is_read() -> None:
    bound = chat(max_tokens=80).bind_tools([get_weather], tool_choice="any")
    ask = HumanMessage("Call get_weather for Rome in celsius.")
    called = bound.invoke([ask])
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert call["name"] == "get_weather" and set(call["args"]) == {"city", "unit"} and not called.invalid_tool_calls
    pieces = list(bound.stream([ask]))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert [c["args"] for c in total.tool_calls] == [call["args"]]  # type: ignore[attr-defined]
    told = [ask, called, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert isinstance(chat().invoke(told).content, str)


@custom_tool(format={"type": "grammar", "syntax": "regex", "definition": "[1-9]{1,3} [+*] [1-9]{1,3}"})
def calculate(code: str) -> str:
    """Calculates."""
    return "3"


def test_a_custom_tool_is_given_a_text_over_responses_and_its_result_is_read() -> None:
    model = chat(max_tokens=60, use_responses_api=True)
    ask = HumanMessage("What is 1 + 2?")
    called = model.bind_tools([calculate], tool_choice="required").invoke([ask])
    [call] = called.tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "calculate"
    assert re.fullmatch(r"[1-9]{1,3} [+*] [1-9]{1,3}", call["args"]["__arg1"])
    told = calculate.invoke({**call, "type": "tool_call"})
    assert isinstance(chat(use_responses_api=True).invoke([ask, called, told]).content, list)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_is_an_object(method: Literal["json_schema", "function_calling", "json_mode"]) -> None:
    asked = chat(max_tokens=120)
    if method == "json_mode":
        assert isinstance(asked.with_structured_output(None, method=method).invoke("Say {} in JSON."), dict)
    else:
        assert isinstance(asked.with_structured_output(Person, method=method).invoke("Who is Mia?"), Person)


def test_plain_completions_and_embeddings() -> None:
    model = OpenAI(**SERVER, temperature=0, max_tokens=4)
    text = model.invoke("Once upon a time")
    assert text and "".join(model.stream("Once upon a time")) == text
    embeddings = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False)  # else it wants OpenAI's tokenizer
    assert len(embeddings.embed_documents(["Tokyo", "a fox"])) == 2
    assert sum(x * x for x in embeddings.embed_query("Tokyo")) == pytest.approx(1, abs=1e-3)


def test_errors_are_of_the_clients_own_classes() -> None:
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(**{**SERVER, "model": "none"}).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat().invoke("word " * 2000)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        list(chat().stream("word " * 2000))


async def _streamed() -> str:
    return "".join([str(piece.content) async for piece in chat().astream(QUESTION)])


def test_the_asynchronous_client_streams_as_well() -> None:
    import asyncio

    assert asyncio.run(_streamed()) == ANSWER
