"""Tools and thoughts over HTTP, from a router that says what a test tells it to; read with the official client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import BadRequestError
from pagewire.v1.inference_pb2 import Accepted, GenerateResponse
from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.openai.answer import Answer
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.shapes import ChatShape
from pagewire_bridge.openai.tool_use import parser_of
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.families import TOOL_FORMATS
from scripted_router import LENGTH, STOP, Bridge, accepted, delta, events_of, running_bridge, says, summary, token

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWERS = AnswerFormat(TOOL_FORMATS["hermes"], True, REASONING_FORMATS["qwen3"])
WEATHER: dict[str, Any] = {"type": "function", "function": {
    "name": "get_weather", "description": "d", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
TEXT = (
    '<think>\nWhich?\n</think>\n\nOk.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "R\\"ome"}}'
    '\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bridge() -> AsyncIterator[Bridge]:
    async with running_bridge(answers=ANSWERS) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(bridge: Bridge) -> None:
    bridge.router.reset()


def in_parts(text: str, places: Sequence[int]) -> list[str]:
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(cuts)]


async def test_a_stream_adds_up_to_the_whole_and_the_client_understands_both(bridge: Bridge) -> None:
    parts = [delta(part, tokens=[token(part.encode(), -1.0)]) for part in in_parts(TEXT, range(0, len(TEXT), 7))]
    bridge.router.script = says(accepted(), *parts, delta(finish=STOP), summary())
    whole = await bridge.openai.chat.completions.create(**ASK, tools=[WEATHER, NOW])
    message = whole.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("Ok.", "Which?", "Which?")  # type: ignore[attr-defined]
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
        ("get_weather", {"city": 'R"ome'}), ("now", {}),
    ]  # fmt: skip
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 3
    async with bridge.openai.chat.completions.stream(**ASK, tools=[WEATHER, NOW]) as stream:
        final = await stream.get_final_completion()
    streamed = final.choices[0].message
    assert streamed.content == message.content and final.choices[0].finish_reason == "tool_calls"
    assert [(c.function.name, c.function.arguments) for c in streamed.tool_calls] == [
        (c.function.name, c.function.arguments) for c in message.tool_calls
    ]
    response = await bridge.chat(tools=[WEATHER, NOW], stream=True, stream_options={"include_usage": True})
    calls = [c for e in events_of(response.text)[:-1] for ch in e["choices"] for c in ch["delta"].get("tool_calls", [])]  # type: ignore[index]
    assert next(sorted(c) for c in calls if c["index"] == 0) == ["function", "id", "index", "type"]
    assert all(sorted(c) == ["function", "index"] and sorted(c["function"]) == ["arguments"]
               for i in (0, 1) for c in [c for c in calls if c["index"] == i][1:])  # fmt: skip
    assert '"reasoning_tokens":3' in response.text


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 300)), st.sampled_from([TEXT, TEXT[:-20], "<think>a", "b </think> c", TEXT[26:90]]))
async def test_any_cut_gives_the_same_message(cuts: list[int], text: str) -> None:
    """Pieces of the stream are put together as clients do: by index, arguments appended."""
    body = ChatBody.model_validate(ASK | {"tools": [WEATHER]})

    def message(parts: list[str]) -> dict[str, Any]:
        parser = parser_of(body, ANSWERS, "")
        assert parser is not None
        answer = Answer(ChatShape(), {}, 1, False, frozenset(), parsers=[parser])
        deltas = [delta(part).delta for part in parts] + [delta(finish=STOP).delta]
        opened: set[int] = set()
        whole: dict[str, Any] = {"calls": {}}
        for choice in (choice for d in deltas for choice in answer.choices(0, d, opened)):
            for name in ("content", "reasoning"):
                whole[name] = whole.get(name, "") + choice["delta"].get(name, "")
            for call in choice["delta"].get("tool_calls", ()):
                known = whole["calls"].setdefault(
                    call["index"], {"name": call["function"].get("name"), "arguments": ""}
                )
                known["arguments"] += call["function"]["arguments"]
            whole["end"] = choice["finish_reason"]
        return whole

    assert message(in_parts(text, cuts)) == message([text])


async def test_what_is_asked_of_the_router(bridge: Bridge) -> None:
    """Tools for the template, thoughts' marks, and a form that holds a call to its schema."""

    async def asked(**fields: Any) -> Any:
        response = await bridge.chat(**fields)
        assert response.status_code == 200, response.text
        return bridge.router.requests[-1]

    request = await asked(tools=[WEATHER], thinking_token_budget=7, reasoning_effort="low")
    assert json.loads(request.chat.tools_json) == [WEATHER]
    assert (request.reasoning.begin, request.reasoning.end, request.reasoning.max_tokens) == ("<think>", "</think>", 7)
    assert json.loads(request.chat.template_kwargs_json) == {"reasoning_effort": "low", "enable_thinking": True}
    assert not request.HasField("structured_output") and request.sampling.skip_special_tokens is False
    request = await asked(tools=[WEATHER], tool_choice="none", reasoning_effort="none")
    assert not request.chat.tools_json and not request.HasField("structured_output")
    assert json.loads(request.chat.template_kwargs_json)["enable_thinking"] is False
    for choice, more in (
        ("required", {}), ({"type": "function", "function": {"name": "now"}}, {}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "now"}}]}}, {"parallel_tool_calls": False}),
    ):  # fmt: skip
        request = await asked(tools=[WEATHER, NOW], tool_choice=choice, **more)
        form = json.loads(request.structured_output.structural_tag)["format"]
        names = [tag["begin"] for tag in form["tags"]]
        assert all("now" in name for name in names) or choice == "required"
        assert form["at_least_one"] and form["stop_after_first"] == (choice != "required")
    request = await asked(tools=[WEATHER], response_format={"type": "json_object"})
    assert [e["type"] for e in json.loads(request.structured_output.structural_tag)["format"]["elements"]] == [
        "tags_with_separator", "json_schema",
    ]  # fmt: skip
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    request = await asked(tools=[strict])
    assert json.loads(request.structured_output.structural_tag)["format"]["type"] == "triggered_tags"
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    request = await asked(messages=[
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "3 pm"},
    ])  # fmt: skip
    fields = [json.loads(m.fields_json) for m in request.chat.messages]
    assert fields[0]["tool_calls"] == [{**call, "function": {"name": "now", "arguments": {"a": 1}}}]
    assert fields[0]["reasoning_content"] == "hm" and fields[1] == {"tool_call_id": "call_1"}


async def test_reasons_to_stop(bridge: Bridge) -> None:
    call = '<think></think><tool_call>{"name": "now"}</tool_call>'
    named = {"type": "function", "function": {"name": "now"}}
    for script, fields, reason in (
        ((delta(call), delta(finish=STOP)), {"tools": [NOW]}, "tool_calls"),
        ((delta(call), delta(finish=STOP)), {"tools": [NOW], "tool_choice": "required"}, "tool_calls"),
        ((delta(call), delta(finish=STOP)), {"tools": [NOW], "tool_choice": named}, "stop"),
        ((delta(call), delta(finish=LENGTH)), {"tools": [NOW]}, "length"),
        ((delta("hi"), delta(finish=STOP)), {"tools": [NOW]}, "stop"),
        ((delta(call), delta(finish=STOP)), {"tools": [NOW], "tool_choice": "none"}, "stop"),
    ):  # fmt: skip
        bridge.router.script = says(accepted(), *script, summary())
        choice = (await bridge.chat(**fields)).json()["choices"][0]
        assert choice["finish_reason"] == reason
        called = "tool_call" in script[0].delta.text and fields.get("tool_choice") != "none"
        assert ("tool_calls" in choice["message"]) == called


@pytest.mark.parametrize(("text", "content"), [(TEXT[TEXT.index("<tool") :], None), ("Ok", ""), (TEXT, "")])
async def test_a_stream_that_begins_with_a_call_begins_no_text(bridge: Bridge, text: str, content: str | None) -> None:
    """A client that makes a text of the first content it is told would show an empty one."""
    bridge.router.script = says(accepted(), *(delta(part) for part in text), delta(finish=STOP), summary())
    first = events_of((await bridge.chat(tools=[WEATHER, NOW], stream=True)).text)[0]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": content}  # type: ignore[index]


async def test_where_calls_may_not_be_parallel_the_first_is_the_only_one(bridge: Bridge) -> None:
    """Streamed or not, in every API; the model made two all the same."""
    anthropic = {"max_tokens": 9, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    tools = [{"name": t["function"]["name"], "input_schema": {"type": "object"}} for t in (WEATHER, NOW)]
    parts = [delta(part) for part in in_parts(TEXT, range(0, len(TEXT), 7))]
    for stream in (False, True):
        bridge.router.script = says(accepted(), *parts, delta(finish=STOP), summary())
        chat = await bridge.chat(tools=[WEATHER, NOW], parallel_tool_calls=False, stream=stream)
        flat = [{"type": "function", **tool["function"]} for tool in (WEATHER, NOW)]
        asked = {"model": "demo", "input": "hi", "tools": flat, "parallel_tool_calls": False, "stream": stream}
        response = await bridge.http.post("/v1/responses", json=asked)
        body = {**ASK, **anthropic, "tools": tools, "stream": stream}
        message = await bridge.http.post("/v1/messages", json=body)
        for answer, reason in ((chat, '"finish_reason":"tool_calls"'), (message, '"stop_reason":"tool_use"')):
            assert answer.text.count('"name":"get_weather"') == 1 and reason in answer.text
        assert not any('"name":"now"' in answer.text for answer in (chat, message))
        if not stream:
            [call] = chat.json()["choices"][0]["message"]["tool_calls"]
            [made] = [item for item in response.json()["output"] if item["type"] == "function_call"]
            [block] = [block for block in message.json()["content"] if block["type"] == "tool_use"]
            assert json.loads(call["function"]["arguments"]) == json.loads(made["arguments"]) == block["input"]
            assert block["input"] == {"city": 'R"ome'}
        else:
            assert response.text.count("response.function_call_arguments.done") == 2  # its name, and its type


async def test_thoughts_that_the_prompt_began_and_thoughts_that_nobody_wants(bridge: Bridge) -> None:
    begun = GenerateResponse(accepted=Accepted(model="demo", prompt_tokens=7, prompt_tail="assistant\n<think>\n"))
    bridge.router.script = says(begun, delta("a</thi"), delta("nk>b"), delta(finish=STOP), summary())
    message = (await bridge.chat()).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("a", "b")
    answer = (await bridge.chat(include_reasoning=False)).json()
    assert "reasoning" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"tools": []}, "tools"), ({"tools": [NOW, NOW]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "code", "function": {"name": "x"}}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [NOW], "tool_choice": "often"}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"functions": [{"name": "x"}], "tools": [NOW]}, "functions"), ({"functions": [{}]}, "functions[0].name"),
    ({"functions": [{"name": "x"}, {"name": "x"}]}, "functions"), ({"function_call": {"name": "x"}}, "function_call"),
    ({"functions": [{"name": "x"}], "function_call": {"name": "y"}}, "function_call"),
    ({"functions": [{"name": "x"}], "function_call": "required"}, "function_call"),
    ({"messages": [{"role": "function", "content": "3"}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [
        {"function": {"name": "f"}}]}]}, "messages[0].function_call"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
])  # fmt: skip
async def test_mistakes_name_their_field(bridge: Bridge, fields: dict[str, Any], param: str) -> None:
    response = await bridge.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert not bridge.router.requests


async def test_clients_that_know_no_tools_are_answered_in_their_words(bridge: Bridge) -> None:
    """LangChain's old agents, and everything that was written before November 2023."""
    functions: Any = [WEATHER["function"], NOW["function"]]
    parts = [delta(part) for part in in_parts(TEXT, range(0, len(TEXT), 7))]
    bridge.router.script = says(accepted(), *parts, delta(finish=STOP), summary())
    whole = (await bridge.openai.chat.completions.create(**ASK, functions=functions)).choices[0]
    call = whole.message.function_call
    assert (whole.finish_reason, whole.message.content, whole.message.tool_calls) == ("function_call", "Ok.", None)
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": 'R"ome'}), "the second has no room"
    name, arguments, reasons = [], "", []
    async for chunk in await bridge.openai.chat.completions.create(**ASK, functions=functions, stream=True):
        piece = chunk.choices[0].delta.function_call
        name += [piece.name] if piece and piece.name else []
        arguments += piece.arguments if piece else ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        assert not chunk.choices[0].delta.tool_calls
    assert (name, arguments, reasons) == (["get_weather"], call.arguments, ["function_call"])
    asked = bridge.router.requests[-1]
    assert json.loads(asked.chat.tools_json) == [WEATHER, NOW]

    bridge.router.script = says(
        accepted(), delta('<tool_call>{"name": "now"}</tool_call>'), delta(finish=STOP), summary()
    )
    named = (await bridge.chat(functions=functions, function_call={"name": "now"})).json()["choices"][0]
    assert named["message"]["function_call"]["name"] == "now" and named["finish_reason"] == "stop"
    form = json.loads(bridge.router.requests[-1].structured_output.structural_tag)["format"]
    assert form["at_least_one"] and form["stop_after_first"]
    for nothing in ({"functions": functions, "function_call": "none"}, {"functions": []}, {"function_call": "auto"}):
        answer = (await bridge.chat(**nothing)).json()["choices"][0]
        assert "function_call" not in answer["message"] and answer["finish_reason"] == "stop"
        assert not bridge.router.requests[-1].chat.tools_json


async def test_what_functions_were_called_and_said_is_told_to_the_template_as_of_tools(bridge: Bridge) -> None:
    call = {"name": "now", "arguments": '{"a": 1}'}
    assert (await bridge.chat(messages=[
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "now", "content": "3 pm"},
        {"role": "assistant", "content": None, "function_call": {"name": "now"}},
        {"role": "function", "name": "now", "content": "4 pm"},
    ])).status_code == 200  # fmt: skip
    messages = bridge.router.requests[-1].chat.messages
    fields = [json.loads(m.fields_json or "{}") for m in messages]
    assert fields[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {"a": 1}}}
    ]
    assert [(m.role, m.name, m.content) for m in messages][2] == ("tool", "now", "3 pm")
    assert [f.get("tool_call_id") for f in fields] == [None, None, "call_1", None, "call_3"]


async def test_without_the_flags_only_forced_calls_are_taken() -> None:
    async with running_bridge() as bare:
        with pytest.raises(BadRequestError, match="enable-auto-tool-choice"):
            await bare.openai.chat.completions.create(**ASK, tools=[NOW])
        bare.router.script = says(accepted(), delta('{"name": "now", "arguments": {}}'), delta(finish=STOP), summary())
        answer = await bare.openai.chat.completions.create(**ASK, tools=[NOW], tool_choice="required")
        assert answer.choices[0].message.tool_calls[0].function.name == "now"
        response = await bare.chat(thinking_token_budget=3)
        assert response.json()["error"]["param"] == "thinking_token_budget"


SQL: dict[str, Any] = {"type": "custom", "custom": {"name": "sql", "description": "asks", "format": {
    "type": "grammar", "grammar": {"syntax": "regex", "definition": "SELECT [a-z]+"}}}}  # fmt: skip
SAY: dict[str, Any] = {"type": "custom", "custom": {"name": "say"}}
SAID = 'Ok. <tool_call>{"name": "say", "arguments": {"input": "a \\"b\\"\\n"}}</tool_call>'
FORCED = '<tool_call>\n{"name": "sql", "arguments": <text>\nSELECT "x"\n'


async def test_a_custom_tool_is_a_function_of_one_text_to_the_model_and_its_calls_go_back(bridge: Bridge) -> None:
    bridge.router.script = says(accepted(), delta(SAID, finish=STOP), summary())
    whole = await bridge.openai.chat.completions.create(**ASK, tools=[SAY, SQL, NOW])
    [call] = whole.choices[0].message.tool_calls
    assert (call.type, call.custom.name, call.custom.input) == ("custom", "say", 'a "b"\n')
    assert whole.choices[0].message.content == "Ok." and whole.choices[0].finish_reason == "tool_calls"
    told = [tool["function"] for tool in json.loads(bridge.router.requests[-1].chat.tools_json)]
    assert [tool["name"] for tool in told] == ["say", "sql", "now"] and told[1]["description"] == "asks"
    assert "SELECT [a-z]+" in told[1]["parameters"]["properties"]["input"]["description"]
    form = json.loads(bridge.router.requests[-1].structured_output.structural_tag)["format"]
    assert [tag["content"]["type"] for tag in form["last_tags"]] == ["regex"] and len(form["tags"]) == 2
    back = [*ASK["messages"], whole.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "done"}]  # fmt: skip
    assert (await bridge.chat(messages=back, tools=[SAY])).status_code == 200
    turn = json.loads(bridge.router.requests[-1].chat.messages[1].fields_json)
    function = {"name": "say", "arguments": {"input": 'a "b"\n'}}
    assert turn["tool_calls"] == [{"id": call.id, "type": "function", "function": function}]
    assert not bridge.router.requests[-1].HasField("structured_output"), "any text will do"


@pytest.mark.parametrize("size", [1, 5, 999])
async def test_a_stream_tells_a_custom_tools_input_as_it_comes(bridge: Bridge, size: int) -> None:
    for text, name, said in ((SAID, "say", 'a "b"\n'), (FORCED, "sql", 'SELECT "x"\n')):
        parts = [delta(text[i : i + size]) for i in range(0, len(text), size)]
        bridge.router.script = says(accepted(), *parts, delta(finish=STOP), summary())
        response = await bridge.chat(tools=[SAY, SQL], stream=True)
        deltas = [choice["delta"] for e in events_of(response.text)[:-1] for choice in e["choices"]]  # type: ignore[index]
        first, *more = [call for d in deltas for call in d.get("tool_calls", ())]
        assert (first["index"], first["type"], first["custom"]) == (0, "custom", {"name": name, "input": ""})
        assert "".join(call["custom"]["input"] for call in more) == said
        assert all(sorted(call) == ["custom", "index"] and [*call["custom"]] == ["input"] for call in more)
        assert len(more) > 3 or size > 1


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "custom", "custom": {"name": "sql"}}, "stop"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "custom", "custom": {"name": "sql"}}]}}, "tool_calls"),
    ],
)  # fmt: skip
async def test_a_custom_tool_can_be_forced(bridge: Bridge, choice: Any, reason: str) -> None:
    bridge.router.script = says(accepted(), delta(FORCED, finish=STOP), summary())
    answer = await bridge.openai.chat.completions.create(**ASK, tools=[NOW, SQL], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].custom.input == 'SELECT "x"\n'
    assert answer.choices[0].finish_reason == reason
    form = json.dumps(json.loads(bridge.router.requests[-1].structured_output.structural_tag))
    assert "SELECT [a-z]+" in form and ("now" in form) == (choice == "required")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools[0].custom.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "x"}}}]},
         "tools[0].custom.format.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar"}}}]},
         "tools[0].custom.format.grammar"),
        ({"tools": [SAY, {"type": "function", "function": {"name": "say"}}]}, "tools"),
        ({"tools": [NOW], "tool_choice": {"type": "custom", "custom": {"name": "say"}}}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "a"}}]}]},
         "messages[0].tool_calls[0].custom.input"),
    ],
)  # fmt: skip
async def test_mistakes_in_custom_tools_name_their_field(bridge: Bridge, fields: dict[str, Any], param: str) -> None:
    response = await bridge.chat(**fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


async def test_an_agent_may_have_many_tools(bridge: Bridge) -> None:
    """More than OpenAI's 128, as one with many servers of tools has."""
    many = [{"type": "function", "function": {"name": f"mcp__server__{i}"}} for i in range(1025)]
    assert (await bridge.chat(tools=many[:1024])).status_code == 200
    assert (await bridge.chat(tools=many)).json()["error"]["param"] == "tools"
