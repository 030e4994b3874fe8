"""JSON that could be read but not written again, and numbers that no float holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.json_text import MAX_DEPTH
from pagewire_bridge.tools.families import TOOL_FORMATS
from scripted_router import STOP, Bridge, accepted, delta, running_bridge, says, summary

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = 123456789012345678901234567890
USER = {"role": "user", "content": "hi"}


def nested(depth: int) -> dict[str, Any]:
    """So many objects and lists in each other, of which the outermost has a key that TGI wants."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"properties": value}
    return value


def called(text: str) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": text}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bridge() -> AsyncIterator[Bridge]:
    async with running_bridge(answers=AnswerFormat(TOOL_FORMATS["json"], auto_tools=True)) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(bridge: Bridge) -> None:
    bridge.router.reset()


async def post(bridge: Bridge, path: str, body: dict[str, Any]) -> tuple[int, str]:
    response = await bridge.http.post(path, content=json.dumps(body).encode())
    return response.status_code, response.text


def bodies_with(deep: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """In every API, with this object in one of its fields."""
    function = {"name": "f", "parameters": deep}
    chat: dict[str, Any] = {"model": "demo", "messages": [USER]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": deep}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "3 pm"}]}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": deep}}
    messages: dict[str, Any] = {**chat, "max_tokens": 9}
    response: dict[str, Any] = {"model": "demo", "input": "hi", "store": False}
    loaded: dict[str, Any] = {**chat, "stream": False}
    return [
        ("/v1/chat/completions", {**chat, "tools": [{"type": "function", "function": function}]}),
        ("/v1/chat/completions", {**chat, "response_format": schema}),
        ("/v1/chat/completions", {**chat, "structured_outputs": {"json": deep}}),
        ("/v1/chat/completions", {**chat, "structured_outputs": {"structural_tag": json.dumps({"format": deep})}}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json", "value": json.dumps(deep)}}),
        ("/v1/completions", {"model": "demo", "prompt": "hi", "guided_json": json.dumps(deep)}),
        ("/v1/chat/completions", {**chat, "chat_template_kwargs": deep}),
        ("/v1/chat/completions", {**chat, "messages": [USER, called(json.dumps(deep)), USER]}),
        ("/v1/responses", {**response, "tools": [{"type": "function", **function}]}),
        ("/v1/responses", {**response, "text": {"format": {**schema["json_schema"], "type": "json_schema"}}}),
        ("/v1/responses", {**response, "input": [{"type": "function_call", "call_id": "c", "name": "f",
                                                  "arguments": json.dumps(deep)}]}),
        ("/generate", {"inputs": "hi", "parameters": {"grammar": {"type": "json", "value": deep}}}),
        ("/generate", {"inputs": "hi", "parameters": {"grammar": {"type": "json", "value": json.dumps(deep)}}}),
        ("/api/chat", {**loaded, "format": deep}),
        ("/api/chat", {**loaded, "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}, USER]}),
        ("/v1/messages", {**messages, "tools": [{"name": "f", "input_schema": deep}]}),
        ("/v1/messages", {**messages, "messages": [USER, use, result]}),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(bodies_with({}))))
async def test_what_is_nested_too_deeply_is_refused_in_every_api(bridge: Bridge, number: int) -> None:
    """It was once read, could not be written for the router, and failed as a fault of the server."""
    bridge.router.script = says(accepted(), delta("ho", tokens=[]), delta("", finish=STOP), summary())
    for depth in (MAX_DEPTH + 1, 300, 900):
        status, text = await post(bridge, *bodies_with(nested(depth))[number])
        assert status in (400, 422) and "nested too deeply" in text
    assert not bridge.router.requests
    await post(bridge, *bodies_with(nested(MAX_DEPTH - 10))[number])
    assert len(bridge.router.requests) == 1


async def test_long_numbers_of_a_call_reach_the_template_as_they_are(bridge: Bridge) -> None:
    arguments = f'{{"id":{LONG},"list":[{-LONG},1.5,1e3],"text":"ü"}}'
    assert (await bridge.chat(messages=[called(arguments), USER])).status_code == 200
    [call] = json.loads(bridge.router.requests[-1].chat.messages[0].fields_json)["tool_calls"]
    assert call["function"]["arguments"] == {"id": LONG, "list": [-LONG, 1.5, 1000.0], "text": "ü"}


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": '])
async def test_what_is_no_json_is_text_for_the_template(bridge: Bridge, text: str) -> None:
    assert (await bridge.chat(messages=[called(text), USER])).status_code == 200
    [call] = json.loads(bridge.router.requests[-1].chat.messages[0].fields_json)["tool_calls"]
    assert call["function"]["arguments"] == text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (f'{{"id": {LONG},\n "of": [1.0, {{"ü": null}}]}}', f'{{"id":{LONG},"of":[1.0,{{"ü":null}}]}}'),
        (json.dumps(nested(900)), "{}"),
        ('{"a": 1e999}', "{}"),
        ("null", "{}"),
        ("[1]", "{}"),
        ("5", "{}"),
    ],
)
async def test_arguments_that_are_objects_have_the_models_numbers(
    bridge: Bridge, arguments: str, expected: str
) -> None:
    """In one line: Ollama's stream is lines. And what is no object is an empty one: Ollama's client reads no other."""
    said = f'{{"name": "now", "arguments": {arguments}}}'
    bridge.router.script = says(accepted(), delta(said), delta(finish=STOP), summary())
    chat: dict[str, Any] = {"model": "demo", "messages": [USER]}
    tool = {"type": "function", "function": {"name": "now"}}
    for path, body, key in (
        ("/v1/messages", {**chat, "max_tokens": 9, "tools": [{"name": "now", "input_schema": {}}]}, "input"),
        ("/api/chat", {**chat, "stream": False, "tools": [tool]}, "arguments"),
        ("/api/chat", {**chat, "tools": [tool]}, "arguments"),
    ):
        status, text = await post(bridge, path, body)
        assert status == 200 and f'"{key}":{expected}' in text
        assert all(json.loads(line) for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}),
        (" {} ", {}),
        ("null", {}),
        ("[1]", {}),
        ("5", {}),
        ('"x"', {}),
        ('" [1]"', {}),
        ('" {}"', {}),
    ],
)
async def test_a_streams_pieces_of_a_call_add_up_to_an_object(
    bridge: Bridge, arguments: str, expected: dict[str, Any]
) -> None:
    """Anthropic's clients read them as one."""
    said = f'{{"name": "now", "arguments": {arguments}}}'
    bridge.router.script = says(accepted(), *map(delta, said), delta(finish=STOP), summary())
    tools = [{"name": "now", "input_schema": {}}]
    body = {"model": "demo", "messages": [USER], "max_tokens": 9, "tools": tools, "stream": True}
    _, text = await post(bridge, "/v1/messages", body)
    lines = (json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: "))
    deltas = [event["delta"] for event in lines if event["type"] == "content_block_delta"]
    assert json.loads("".join(d["partial_json"] for d in deltas) or "{}") == expected


@pytest.mark.parametrize("number", range(len(bodies_with({}))))
async def test_long_numbers_reach_the_router_as_they_are_in_every_api(bridge: Bridge, number: int) -> None:
    """As a schema's `const` or a call's argument: they became floats."""
    bridge.router.script = says(accepted(), delta("ho", tokens=[]), delta("", finish=STOP), summary())
    await post(bridge, *bodies_with({"properties": {}, "const": LONG, "list": [-LONG]})[number])
    [request] = bridge.router.requests
    assert str(LONG) in str(request) and str(-LONG) in str(request)


async def test_long_numbers_are_told_and_stored_as_they_are(bridge: Bridge) -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"const": LONG}, "strict": True}
    body = {"model": "demo", "input": "hi", "tools": [tool]}
    for stream in (False, True):
        bridge.router.script = says(accepted(), delta("ho"), delta(finish=STOP), summary())
        status, text = await post(bridge, "/v1/responses", {**body, "stream": stream})
        assert status == 200 and f'"const":{LONG}' in text
    told = (await bridge.http.post("/v1/responses", json=body)).json()
    found = await bridge.http.get(f"/v1/responses/{told['id']}")
    assert json.loads(found.text)["tools"] == [tool]


async def test_what_is_no_number_of_a_float_is_refused(bridge: Bridge) -> None:
    response = await bridge.http.post("/v1/chat/completions", content=b'{"seed": %s}' % (b"9" * 400))
    assert response.status_code == 400 and "not valid JSON" in response.json()["error"]["message"]
