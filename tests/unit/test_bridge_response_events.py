"""OpenAI's Responses API: items of a conversation as a chat, and events that add up to the response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1.inference_pb2 import Delta, Summary, TokenText
from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.openai.responses.answer import Answer
from pagewire_bridge.openai.responses.items import input_items, to_messages
from pagewire_bridge.openai.responses.schema import ResponsesBody
from pagewire_bridge.openai.responses.translate import to_chat_body, to_head
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.calls import Tool
from pagewire_bridge.tools.families import TOOL_FORMATS
from pagewire_core.errors import InvalidRequest
from response_events import TEXT, WEATHER, Fields, in_parts, read_back
from scripted_router import LENGTH, STOP

# ---------------------------------------------------------------- translation


def messages_of(items: Any) -> list[Fields]:
    return to_messages(input_items(items))


def test_a_string_and_its_parts_are_the_same_message() -> None:
    for content in ("ab", [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]):
        for item in ({"role": "user", "content": content}, {"type": "message", "role": "user", "content": content}):
            assert messages_of([item]) == [{"role": "user", "content": "ab"}]
    assert messages_of("ab") == [{"role": "user", "content": "ab"}]


def test_what_one_turn_of_the_model_gave_is_one_message_again() -> None:
    call: Fields = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]}
    result = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "sunny"}]}
    told = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "ok", "reasoning": "hm", "tool_calls": [told, told]}
    alone = {"role": "assistant", "content": "", "tool_calls": [told]}
    tool = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    user = {"role": "user", "content": "x"}
    assert messages_of([user, thought, said, call, call, result, call, result]) == [user, turn, tool, alone, tool]
    assert messages_of([said, said]) == [{"role": "assistant", "content": "ok"}] * 2
    assert messages_of([call, said]) == [alone, {"role": "assistant", "content": "ok"}]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (None, "input"),
        ([], "input"),
        ([1], "input[0]"),
        ([{"type": "computer_call"}], "input[0].type"),
        ([{"type": 3}], "input[0].type"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "tool", "content": ""}], "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"type": "function_call", "call_id": "1", "name": "f"}], "input[0].arguments"),
        (["x", {"type": "function_call_output", "call_id": "1", "output": 3}], "input[0]"),
        ([{"type": "reasoning", "content": [{"text": 1}]}], "input[0].content[0]"),
    ],
)
def test_a_bad_item_is_told_by_its_place(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        input_items(value)
    assert error.value.param == param


def test_every_field_becomes_the_chats() -> None:
    schema = {"type": "object"}
    fields = {
        "input": "hi", "instructions": "be kind", "max_output_tokens": 9, "temperature": 0.5, "top_k": 3, "seed": 5,
        "tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}, "parallel_tool_calls": False,
        "reasoning": {"effort": "low"}, "top_logprobs": 2, "prompt_cache_key": "k", "stop": "END",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
    }  # fmt: skip
    body = ResponsesBody.model_validate(fields)
    chat = to_chat_body(body, body.input)
    assert [(m.role, m.content) for m in chat.messages] == [("system", "be kind"), ("user", "hi")]
    assert (chat.length_limit(), chat.temperature, chat.top_k, chat.seed, chat.stop) == (9, 0.5, 3, 5, ["END"])
    assert chat.response_format and chat.response_format.json_schema.schema_ == schema  # type: ignore[union-attr]
    assert chat.tools and chat.tools[0].function.strict and chat.tools[0].function.name == "get_weather"
    assert chat.tool_choice.function.name == "get_weather"  # type: ignore[union-attr]
    assert (chat.logprobs, chat.top_logprobs, chat.reasoning_effort, chat.session) == (True, 2, "low", "k")
    assert chat.parallel_tool_calls is False
    head = to_head(body, "resp_1", "demo", 1)
    assert head["text"] == {"format": fields["text"]["format"]}  # type: ignore[index]
    assert head["tools"] == [{**WEATHER, "description": None, "strict": True}]
    assert head["tool_choice"] == fields["tool_choice"] and head["parallel_tool_calls"] is False


# ---------------------------------------------------------------- events


def told(parts: Sequence[str], finish: int = STOP, *, with_parser: bool = True) -> tuple[list[Fields], Answer]:
    """Events of an answer whose text comes in these parts, each of them a token."""
    tools = [Tool("get_weather"), Tool("now")]
    parser = AnswerParser(TOOL_FORMATS["hermes"].parser(tools), REASONING_FORMATS["qwen3"], "") if with_parser else None
    answer = Answer({"id": "resp_" + "0" * 32}, parser, with_logprobs=True)
    events = answer.begin()
    for i, part in enumerate(parts):
        tokens = [TokenText(token_id=i, bytes=part.encode(), logprob=-1.0)] if part else []
        end = finish if i == len(parts) - 1 else 0
        events += answer.take(Delta(text=part, tokens=tokens, finish_reason=end))  # type: ignore[arg-type]
    answer.end(Summary(prompt_tokens=7, completion_tokens=len(parts)))
    return [*events, answer.last()], answer


@given(st.lists(st.integers(0, 500)), st.integers(0, len(TEXT)), st.sampled_from([STOP, LENGTH]))
def test_events_are_in_order_and_add_up_however_the_text_was_cut(places: list[int], length: int, finish: int) -> None:
    """Also of an answer that ends in the middle: of thoughts, of a mark, of a call."""
    text = TEXT[:length]
    final = read_back(told(in_parts(text, places) or [""], finish)[0])
    whole = read_back(told([text], finish)[0])

    def content(response: Fields) -> list[tuple[Any, ...]]:
        texts = [(i["type"], i["status"], i.get("name"), i.get("arguments"), *(p["text"] for p in i.get("content", ())))
                 for i in response["output"]]  # fmt: skip
        return texts

    assert content(final) == content(whole)
    assert final["status"] == ("incomplete" if finish == LENGTH else "completed")
    assert final["incomplete_details"] == ({"reason": "max_output_tokens"} if finish == LENGTH else None)
    assert [item["status"] for item in final["output"]] == ["completed"] * (len(final["output"]) - 1) + [
        final["status"]
    ]
    if length == len(TEXT):
        assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
        assert final["output"][1]["content"][0]["text"] == "Ok, ünd."
        assert [json.loads(i["arguments"]) for i in final["output"][2:]] == [{"city": 'R"ome'}, {}]


@given(st.text(max_size=40), st.lists(st.integers(0, 500)))
def test_log_probabilities_are_those_of_the_text(text: str, places: list[int]) -> None:
    text = text.encode("utf-8", "ignore").decode()
    final = read_back(told(in_parts(text, places) or [""], with_parser=False)[0])
    [item] = final["output"]
    [part] = item["content"]
    assert part["text"] == text == b"".join(bytes(t["bytes"]) for t in part["logprobs"]).decode()


@pytest.mark.parametrize("text", ["<b>x", "<think>hm</think>\n\nHi you", "</x"])
def test_thoughts_and_marks_have_no_part_in_log_probabilities(text: str) -> None:
    [*_, message] = read_back(told([*text])[0])["output"]
    [part] = message["content"]
    assert "".join(t["token"] for t in part["logprobs"]) == part["text"] == text.rpartition("</think>\n\n")[2]
