"""OpenAI's Responses API: its translation, the order of its events, and what is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.responses import Response
from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.app import create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.keys import ApiKey, KeyRing, digest_of
from pagewire_bridge.main import build_server, listen
from pagewire_bridge.openai.responses.schema import ResponsesBody
from pagewire_bridge.openai.responses.shelf import LocalShelf, Shelf, open_shelf
from pagewire_bridge.openai.responses.store import Record, ResponseStore
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.families import TOOL_FORMATS
from pagewire_core.errors import ContextLength, InvalidRequest, Unavailable
from processes import free_port
from redis.asyncio import Redis
from response_events import TEXT, WEATHER, Fields, in_parts, read_back
from scripted_router import (
    HELLO,
    STOP,
    Bridge,
    Events,
    Script,
    ScriptedRouter,
    accepted,
    delta,
    eventually,
    refuses,
    running_bridge,
    running_router,
    says,
    stalls_after,
    summary,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWERS = AnswerFormat(TOOL_FORMATS["hermes"], True, REASONING_FORMATS["qwen3"])
USAGE = {
    "input_tokens": 7, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0}, "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 10,
}  # fmt: skip


def in_two(go_on: asyncio.Event) -> Callable[[GenerateRequest], Events]:
    """A router's answer whose second half waits."""

    async def script(_request: GenerateRequest) -> Events:
        yield accepted()
        yield delta("Hel")
        await go_on.wait()
        yield delta("lo", finish=STOP)
        yield summary()

    return script


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Bridge]:
    async with running_bridge(answers=ANSWERS) as bridge:
        yield bridge


async def ask(bridge: Bridge, **fields: Any) -> httpx.Response:
    return await bridge.http.post("/v1/responses", json={"model": "demo", "input": "hi", **fields})


async def streamed(bridge: Bridge, **fields: Any) -> list[Fields]:
    """The events, whose names are their types."""
    response = await ask(bridge, stream=True, **fields)
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


# ---------------------------------------------------------------- over HTTP


async def test_an_answer_has_every_key_of_a_response(bridge: Bridge) -> None:
    response = await ask(bridge, metadata={"a": "b"}, user="u", service_tier="auto", tools=[], verbosity="low",
                         text={"verbosity": "low"}, reasoning={"summary": "auto"})  # fmt: skip
    body = response.json()
    assert response.headers["x-pagewire-ignored-fields"] == "reasoning.summary,text.verbosity,verbosity"
    assert response.headers["x-pagewire-cached-tokens"] == "4"
    assert abs(body.pop("created_at") - body.pop("completed_at")) <= 1
    suffix = response.headers["x-request-id"]
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert body == {
        "id": f"resp_{suffix}", "object": "response", "status": "completed", "model": "demo", "usage": USAGE,
        "output": [{"id": f"msg_{suffix}_0", "type": "message", "role": "assistant", "status": "completed",
                    "content": [part]}],
        "background": False, "store": True, "error": None, "incomplete_details": None, "instructions": None,
        "previous_response_id": None, "max_output_tokens": None, "max_tool_calls": None, "temperature": None,
        "top_p": None, "user": "u", "safety_identifier": None, "prompt_cache_key": None, "metadata": {"a": "b"},
        "parallel_tool_calls": True, "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}}, "tools": [], "tool_choice": "auto", "top_logprobs": 0,
        "truncation": "disabled", "service_tier": "default",
    }  # fmt: skip
    final = read_back(await streamed(bridge))
    assert final["usage"] == USAGE and final["output"][0]["content"] == [part]


async def test_thoughts_and_calls_are_items_and_go_back_as_they_came(bridge: Bridge) -> None:
    bridge.router.script = says(accepted(), *(delta(c) for c in in_parts(TEXT, range(0, 400, 7))), delta(finish=STOP),
                                summary())  # fmt: skip
    first = await bridge.openai.responses.create(model="demo", input="hi", tools=[WEATHER])  # type: ignore[list-item]
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    call = first.output[2]
    assert call.type == "function_call" and call.name == "get_weather" and json.loads(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    await bridge.openai.responses.create(model="demo", input=[result], previous_response_id=first.id)
    by_id = bridge.router.requests[-1].chat.messages
    stateless: Any = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in first.output), result]
    await bridge.openai.responses.create(model="demo", input=stateless, store=False)
    referred: Any = [{"role": "user", "content": "hi"}, *({"id": item.id} for item in first.output), result]
    await bridge.openai.responses.create(model="demo", input=referred, store=False)
    by_items, by_reference = (request.chat.messages for request in bridge.router.requests[-2:])
    assert by_id == by_items == by_reference
    assert [message.role for message in by_id] == ["user", "assistant", "tool"]
    turn = json.loads(by_id[1].fields_json)
    assert by_id[1].content == "Ok, ünd." and turn["reasoning"] == "Which?" and len(turn["tool_calls"]) == 2


async def test_a_conversation_goes_on_from_what_is_stored(bridge: Bridge) -> None:
    """Instructions are not carried over, as at OpenAI."""
    client = bridge.openai.responses
    first = await client.create(model="demo", input="one", instructions="be kind")
    second = await client.create(model="demo", input="two", previous_response_id=first.id)
    await client.create(model="demo", input="three", previous_response_id=second.id, instructions="be brief")
    asked = bridge.router.requests[-1]
    assert [(m.role, m.content) for m in asked.chat.messages] == [
        ("system", "be brief"), ("user", "one"), ("assistant", "Hello"), ("user", "two"), ("assistant", "Hello"),
        ("user", "three"),
    ]  # fmt: skip
    assert {request.session_id for request in bridge.router.requests} == {first.id}
    assert (await client.retrieve(second.id)).model_dump() == second.model_dump()
    items = await client.input_items.list(second.id, order="asc", limit=2)
    assert [item.content[0].text for item in items.data] == ["one", "Hello"] and items.has_more  # type: ignore[union-attr]
    assert [item.content[0].text async for item in client.input_items.list(second.id, limit=1)] == [  # type: ignore[union-attr]
        "two", "Hello", "one"]  # fmt: skip
    for query in ("limit=0", "limit=101", "limit=" + "9" * 5000, "limit=x", "order=up", "after=msg_1"):
        refused = await bridge.http.get(f"/v1/responses/{second.id}/input_items?{query}")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == query.partition("=")[0]
    for query in ("stream=1", "stream=true&starting_after=-1", "stream=true&starting_after=" + "9" * 5000):
        assert (await bridge.http.get(f"/v1/responses/{second.id}?{query}")).status_code == 400
    await client.delete(first.id)
    for call in (client.retrieve(first.id), client.delete(first.id), client.retrieve("resp_x")):
        with pytest.raises(NotFoundError):
            await call
    with pytest.raises(BadRequestError) as lost:
        await client.create(model="demo", input="x", previous_response_id=second.id)
    assert lost.value.param == "previous_response_id" and first.id in lost.value.message


async def test_what_is_not_to_be_stored_is_not(bridge: Bridge) -> None:
    answer = await bridge.openai.responses.create(model="demo", input="x", store=False)
    assert answer.store is False  # type: ignore[attr-defined]
    with pytest.raises(NotFoundError):
        await bridge.openai.responses.retrieve(answer.id)


async def test_a_clients_request_id_names_no_response(bridge: Bridge) -> None:
    """The id that a proxy gives to every try would have one response overwrite another."""
    headers = {"x-request-id": "mine"}
    ids = [(await bridge.http.post("/v1/responses", json={"input": "x"}, headers=headers)).json()["id"] for _ in "ab"]
    assert ids[0] != ids[1] and all(bridge.router.requests[-i].request_id == "mine" for i in (1, 2))


async def test_a_failure_in_the_middle_is_a_response_that_failed(bridge: Bridge) -> None:
    async def lost(_request: GenerateRequest) -> Events:
        yield accepted()
        yield delta("Hel")
        raise Unavailable("The decode worker was lost.")

    bridge.router.script = lost
    final = read_back(await streamed(bridge))
    assert final["status"] == "failed" and final["usage"] is None and "completed_at" not in final
    assert final["error"] == {"code": "server_error", "message": "The decode worker was lost."}
    assert final["output"][0]["status"] == "incomplete" and final["output"][0]["content"][0]["text"] == "Hel"
    assert (await bridge.openai.responses.retrieve(final["id"])).status == "failed"
    assert (await ask(bridge)).status_code == 503


async def test_a_function_in_a_namespace_has_both_names(bridge: Bridge) -> None:
    """The model knows it by one, which no function outside of it has."""
    call = '<tool_call>{"name": "sky__get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    bridge.router.script = says(accepted(), delta(call, finish=STOP), summary())
    tools: Any = [WEATHER, {"type": "namespace", "name": "sky", "description": "Of the sky.", "tools": [WEATHER]}]
    first = await bridge.openai.responses.create(model="demo", input="hi", tools=tools)
    offered = [tool["function"] for tool in json.loads(bridge.router.requests[-1].chat.tools_json)]
    assert [tool["name"] for tool in offered] == ["get_weather", "sky__get_weather"]
    assert offered[1]["parameters"] == offered[0]["parameters"] and offered[1]["description"].startswith("Of the sky.")
    [item] = first.output
    assert item.type == "function_call" and (item.namespace, item.name) == ("sky", "get_weather")
    events = await streamed(bridge, tools=tools)
    assert [e["item"]["namespace"] for e in events if e["type"].startswith("response.output_item")] == ["sky", "sky"]
    result: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    for history in ([item.model_dump()], [{"id": item.id}]):
        chosen: Any = {"type": "function", "name": "get_weather", "namespace": "sky"}
        asked: Any = [{"role": "user", "content": "hi"}, *history, result]
        await bridge.openai.responses.create(model="demo", input=asked, tools=tools, tool_choice=chosen)
        turn = json.loads(bridge.router.requests[-1].chat.messages[1].fields_json)
        assert turn["tool_calls"][0]["function"]["name"] == "sky__get_weather"


async def test_a_custom_tool_is_given_a_text_and_its_calls_go_back(bridge: Bridge) -> None:
    """Whole and streamed, from a namespace or not; sent again, referred to, or stored."""
    call = '<tool_call>{"name": "sky__say", "arguments": {"input": "\\u00fc \\"x\\""}}</tool_call>'
    bridge.router.script = says(accepted(), *(delta(part) for part in in_parts(call, range(0, len(call), 5))),
                                delta(finish=STOP), summary())  # fmt: skip
    say: Fields = {"type": "custom", "name": "say", "description": "d"}
    sql = {"type": "grammar", "syntax": "lark", "definition": "start: /[a-z]+/"}
    tools: Any = [{**say, "format": sql}, {"type": "namespace", "name": "sky", "tools": [say, WEATHER]}]
    first = await bridge.openai.responses.create(model="demo", input="hi", tools=tools)
    [item] = first.output
    assert item.type == "custom_tool_call" and (item.namespace, item.name, item.input) == ("sky", "say", 'ü "x"')
    assert [tool.model_dump(exclude_none=True) for tool in first.tools] == [
        tools[0], tools[1] | {"tools": [say, {**WEATHER, "strict": True}]},
    ]  # fmt: skip
    form = json.loads(bridge.router.requests[-1].structured_output.structural_tag)["format"]
    assert [tag["content"] for tag in form["last_tags"]] == [{"type": "grammar", "grammar": "start: /[a-z]+/"}]
    events = await streamed(bridge, tools=tools)
    assert [i["input"] for i in read_back(events)["output"]] == ['ü "x"']
    assert len([e for e in events if e["type"] == "response.custom_tool_call_input.delta"]) > 1
    result: Any = {"type": "custom_tool_call_output", "call_id": item.call_id,
                   "output": [{"type": "input_text", "text": "done"}]}  # fmt: skip
    again: Any = [{"role": "user", "content": "hi"}, item.model_dump(), result]
    for fields in ({"input": again}, {"input": [again[0], {"id": item.id}, result]},
                   {"input": [result], "previous_response_id": first.id}):  # fmt: skip
        last: Any = await bridge.openai.responses.create(
            model="demo", tools=tools, tool_choice={"type": "custom", "name": "say"}, **fields
        )
        messages = bridge.router.requests[-1].chat.messages
        turn = json.loads(messages[1].fields_json)["tool_calls"][0]
        assert turn["function"] == {"name": "sky__say", "arguments": {"input": 'ü "x"'}} and turn["id"] == item.call_id
        assert (messages[2].role, messages[2].content) == ("tool", "done")
    items = await bridge.openai.responses.input_items.list(last.id, order="asc")
    assert [i.type for i in items.data] == ["message", "custom_tool_call", "custom_tool_call_output"]


async def test_web_search_is_left_out_and_named(bridge: Bridge) -> None:
    """Coding agents offer it to whatever model they are given."""
    for others in ([WEATHER], []):
        response = await ask(bridge, tools=[*others, {"type": "web_search", "external_web_access": False}])
        assert response.status_code == 200, response.text
        assert response.headers["x-pagewire-ignored-fields"] == "tools.web_search"
        assert len(json.loads(bridge.router.requests[-1].chat.tools_json or "[]")) == len(others)


async def test_refusals_have_their_status_and_the_field_of_this_api(bridge: Bridge) -> None:
    bridge.router.script = refuses(ContextLength("too long", "messages"))
    for stream in (False, True):
        refused = await ask(bridge, stream=stream)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["param"] == "input"
    bridge.router.script = refuses(InvalidRequest("no", "structured_outputs"))
    refused = await ask(bridge, text={"format": {"type": "json_object"}})
    assert refused.json()["error"]["param"] == "text.format"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "namespace", "name": "crm", "tools": []}]}, "tools[0].tools"),
        (
            {"tools": [{"type": "namespace", "name": "crm", "tools": [{"type": "web_search", "name": "x"}]}]},
            "tools[0].tools[0].type",
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id"),
        ({"input": [{"id": "msg_" + "0" * 32 + "_0"}]}, "input[0].id"),
        ({"background": True, "store": False}, "background"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_anything_runs(bridge: Bridge, fields: Fields, param: str) -> None:
    refused = await ask(bridge, **fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert not bridge.router.requests


async def test_thoughts_may_be_parts_of_any_text(bridge: Bridge) -> None:
    parts = [
        {"type": "reasoning_text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
    ]
    given = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "content": parts},
        {"role": "user", "content": "y"},
    ]
    response = await ask(bridge, input=given)
    assert response.status_code == 200, response.text
    turn = bridge.router.requests[-1].chat.messages[1]
    assert (turn.role, json.loads(turn.fields_json)["reasoning"]) == ("assistant", "abc")


async def test_every_parameter_may_be_null(bridge: Bridge) -> None:
    assert (await ask(bridge, **dict.fromkeys(set(ResponsesBody.model_fields) - {"input"}))).status_code == 200


async def test_a_method_that_is_not_there_names_all_that_are(bridge: Bridge) -> None:
    refused = await bridge.http.options("/v1/responses/resp_1")
    assert refused.status_code == 405 and refused.headers["allow"] == "DELETE, GET, HEAD"


async def test_a_client_that_leaves_cancels_its_response(bridge: Bridge) -> None:
    bridge.router.script = stalls_after(accepted(), delta("Hel"))
    stream = await bridge.openai.responses.create(model="demo", input="x", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await eventually(lambda: bridge.router.num_cancelled == 1)


# ---------------------------------------------------------------- where responses are kept


@asynccontextmanager
async def bridge_with(script: Script = HELLO, **options: Any) -> AsyncIterator[str]:
    """The URL of a bridge."""
    router = ScriptedRouter()
    router.script = script
    async with running_router(router) as (_, address):
        listener = listen("127.0.0.1", 0)
        server = build_server(create_app(lambda: RouterClient(address, 30), **options))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        await serving


async def test_another_tenants_response_is_not_there() -> None:
    keys = KeyRing(
        [ApiKey(name=name, sha256=digest_of(name), tenant=t) for name, t in (("a", "x"), ("b", "x"), ("c", "y"))]
    )
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(bridge_with(keys=keys))
        clients = [AsyncOpenAI(base_url=url, api_key=name, max_retries=0) for name in ("a", "b", "c")]
        one, same, other = [(await stack.enter_async_context(client)).responses for client in clients]
        mine = await one.create(model="demo", input="secret")
        assert (await same.retrieve(mine.id)).id == mine.id
        items = other.input_items.list(mine.id)
        for call in (other.retrieve(mine.id), other.delete(mine.id), other.cancel(mine.id), items):
            with pytest.raises(NotFoundError):
                await call
        with pytest.raises(BadRequestError):
            await other.create(model="demo", input="what was it?", previous_response_id=mine.id)
        with pytest.raises(BadRequestError):
            await other.create(model="demo", input=[{"type": "item_reference", "id": mine.output[0].id or ""}])


async def test_without_an_answer_of_redis_responses_are_given_and_not_stored() -> None:
    async with bridge_with(redis_url=f"redis://127.0.0.1:{free_port()}/0") as url, httpx.AsyncClient() as http:
        answer = (await http.post(f"{url}/responses", json={"input": "x"})).json()
        assert answer["status"] == "completed" and answer["store"] is False
        away = await http.get(f"{url}/responses/{answer['id']}")
        assert away.status_code == 503 and int(away.headers["retry-after"]) >= 1
        more = {"input": "x", "previous_response_id": answer["id"]}
        assert (await http.post(f"{url}/responses", json=more)).status_code == 503


async def test_a_bridge_without_redis_keeps_what_it_has_room_for() -> None:
    shelf = LocalShelf(max_bytes=10)
    await shelf.put("a", b"12345", 60)
    await shelf.append("b", 0, [b"123", b"45"], 60)
    assert await shelf.get("a", 60) == b"12345"  # used after b
    await shelf.put("c", b"123", 60)
    assert await shelf.since("b", 0) == [] and await shelf.get("a") and await shelf.get("c")
    await shelf.put("c", b"1", 60)
    await shelf.put("d", b"1234", 60)
    assert await shelf.get("a")


@pytest_asyncio.fixture(params=["local", "redis"], loop_scope="module")
async def shelf(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[Shelf]:
    opened = open_shelf(redis_url if request.param == "redis" else None)
    async with asyncio.timeout(10):
        while not await reachable(opened):
            await asyncio.sleep(0.05)
    yield opened
    await opened.close()


async def reachable(shelf: Shelf) -> bool:
    try:
        return await shelf.get("nothing") is None
    except Unavailable:
        return False


async def test_a_shelf_keeps_lists_and_values_for_their_time(shelf: Shelf) -> None:
    await shelf.append("list", 0, [b"a", b"b"], 60)
    await shelf.append("list", 2, [b"c"], 60)
    assert await shelf.since("list", 1) == [b"b", b"c"] and await shelf.since("list", 3) == []
    await shelf.put("short", b"x", 1)
    assert await shelf.renew("short", 60) and not await shelf.renew("none", 60)
    await shelf.put("shorter", b"x", 60)
    assert await shelf.get("shorter", 1) == b"x"
    await asyncio.sleep(1.05)
    assert await shelf.get("short") == b"x" and await shelf.get("shorter") is None
    assert await shelf.delete("short", "list") and not await shelf.delete("short")


async def test_what_is_put_into_a_list_again_is_there_once(shelf: Shelf) -> None:
    await shelf.append("again", 0, [b"a", b"b"], 60)
    await shelf.append("again", 0, [b"a", b"b", b"c"], 60)
    await shelf.append("again", 1, [b"b"], 60)
    assert await shelf.since("again", 0) == [b"a", b"b", b"c"]
    await shelf.append("again", 4, [b"e"], 60)  # d was lost: the numbers of what follows would be others
    assert await shelf.since("again", 0) == [b"a", b"b", b"c"] and await shelf.delete("again")


async def test_what_runs_is_kept_for_as_long_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pagewire_bridge.openai.responses.shelf.time", SimpleNamespace(monotonic=lambda: now))
    store, name = ResponseStore(LocalShelf(), 60), "resp_" + "3" * 32
    await store.begin("t", Record({"id": name, "status": "queued", "output": []}, [], name))
    await store.tell("t", name, 0, [b"created", b"queued"])
    for now in range(0, 1200, 10):  # noqa: B007 (the clock of the shelf)
        assert await store.go_on("t", name)
    await store.tell("t", name, 2, [b"in_progress"])
    assert await store.told("t", name, 0) == [b"created", b"queued", b"in_progress"]
    assert await store.find("t", name)
    now += 601
    assert await store.told("t", name, 0) == []


async def test_only_one_ends_what_runs(shelf: Shelf) -> None:
    """A response cannot be told as cancelled and be completed."""
    store, name = ResponseStore(shelf, 60), "resp_" + "1" * 32

    def record(status: str) -> Record:
        return Record({"id": name, "status": status, "output": []}, [], name)

    await store.begin("t", record("queued"))
    assert await store.go_on("t", name) and await store.change("t", record("in_progress"))
    assert await store.find("t", name) == record("in_progress")
    assert await store.change("t", record("cancelled"))
    assert not await store.change("t", record("completed")) and not await store.go_on("t", name)
    assert await store.find("t", name) == record("cancelled")
    await store.begin("t", record("in_progress"))
    assert await store.delete("t", name) and not await store.change("t", record("completed"))
    assert await store.find("t", name) is None


async def test_what_has_lost_its_bridge_has_failed(shelf: Shelf) -> None:
    store, name = ResponseStore(shelf, 60), "resp_" + "2" * 32
    await store.begin("t", Record({"id": name, "status": "in_progress", "output": []}, [], name))
    await shelf.delete(f"pw:response:t:{name}:lease")  # as its time does
    record = await store.find("t", name)
    assert record and record.response["status"] == "failed" and record.response["error"]["code"] == "server_error"


# ---------------------------------------------------------------- in the background


async def ended(client: AsyncOpenAI, response_id: str) -> Response:
    async with asyncio.timeout(20):
        while (found := await client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
    return found


async def again(bridge: Bridge, response_id: str, **asked: int) -> list[Fields]:
    stream = await bridge.openai.responses.retrieve(response_id, stream=True, **asked)  # type: ignore[call-overload]
    return [event.to_dict() async for event in stream]


async def test_a_background_response_is_found_when_it_is_done(bridge: Bridge) -> None:
    begun = await bridge.openai.responses.create(input="hi", background=True)
    assert begun.status == "queued" and begun.background and begun.output == [] and begun.model == "demo"
    done = await ended(bridge.openai, begun.id)
    assert done.status == "completed" and done.output_text == "Hello" and done.usage
    assert (await bridge.openai.responses.cancel(begun.id)).status == "completed"
    more = await bridge.openai.responses.create(model="demo", input="more", previous_response_id=begun.id)
    assert more.output_text == "Hello" and len(bridge.router.requests[-1].chat.messages) == 3
    with pytest.raises(BadRequestError, match="stream"):
        await again(bridge, begun.id)
    with pytest.raises(BadRequestError, match="background"):
        await bridge.openai.responses.cancel(more.id)
    with pytest.raises(BadRequestError, match="stream"):
        await again(bridge, more.id)


async def test_a_background_stream_can_be_left_and_read_again_from_any_event(bridge: Bridge) -> None:
    go_on = asyncio.Event()

    bridge.router.script = in_two(go_on)
    stream = await bridge.openai.responses.create(model="demo", input="x", background=True, stream=True)
    async for event in stream:
        if event.type == "response.created":
            name = event.response.id
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    with pytest.raises(BadRequestError, match="running"):
        await bridge.openai.responses.create(model="demo", input="x", previous_response_id=name)
    reading = asyncio.create_task(again(bridge, name))
    await asyncio.sleep(0.05)
    go_on.set()
    events = await reading
    final = read_back(events)
    assert final["output"][0]["content"][0]["text"] == "Hello" and not bridge.router.num_cancelled
    assert [event["type"] for event in events[:3]] == [f"response.{k}" for k in ("created", "queued", "in_progress")]
    for after in range(len(events)):
        assert await again(bridge, name, starting_after=after) == events[after + 1 :]
    assert (await bridge.openai.responses.retrieve(name)).to_dict() == final


@pytest.mark.parametrize("is_accepted", [True, False])
async def test_a_background_response_ends_when_it_is_cancelled(
    bridge: Bridge, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it waits to begin."""
    monkeypatch.setattr("pagewire_bridge.openai.responses.routes._ACCEPTED_S", 0.05)
    bridge.router.script = stalls_after(accepted(), delta("Hel")) if is_accepted else stalls_after()
    ask_for: Fields = {"model": "demo", "input": "x", "background": True, "stream": True}
    stream = await bridge.openai.responses.create(**ask_for)
    events = []
    async for event in stream:
        events.append(event.to_dict())
        if event.type in ("response.output_text.delta", "response.queued") and len(events) > 2 * is_accepted + 1:
            cancelled = await bridge.openai.responses.cancel(events[0]["response"]["id"])
            assert cancelled.status == "cancelled"
    await eventually(lambda: bridge.router.num_cancelled == 1)
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["status"] == "cancelled"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (await bridge.openai.responses.retrieve(cancelled.id)).status == "cancelled"
    assert (await bridge.openai.responses.cancel(cancelled.id)).status == "cancelled"


async def test_a_deleted_background_response_does_not_go_on(bridge: Bridge) -> None:
    bridge.router.script = stalls_after(accepted(), delta("Hel"))
    begun = await bridge.openai.responses.create(model="demo", input="hi", background=True)
    await bridge.openai.responses.delete(begun.id)
    await eventually(lambda: bridge.router.num_cancelled == 1)
    with pytest.raises(NotFoundError):
        await bridge.openai.responses.retrieve(begun.id)


@pytest.mark.parametrize("when", ["while it runs", "at its end"])
async def test_a_background_response_that_redis_has_lost_is_stored_again(
    redis_url: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emptied, or started again without a disk. It once ended as if the client had deleted it: 404 for ever."""
    if when == "at its end":
        monkeypatch.setattr("pagewire_bridge.openai.responses.background.TICK_S", 60.0)
    go_on = asyncio.Event()
    async with (
        bridge_with(in_two(go_on), redis_url=redis_url) as url,
        AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client,
        Redis.from_url(redis_url) as redis,
    ):
        begun = await client.responses.create(model="demo", input="hi", background=True)
        await until_running(client, begun.id)
        await redis.flushall()
        with pytest.raises(NotFoundError):
            await client.responses.retrieve(begun.id)
        if when == "while it runs":
            await until_running(client, begun.id)
        go_on.set()
        await until_running(client, begun.id, "completed")
        assert (await client.responses.retrieve(begun.id)).output_text == "Hello"
        assert not await redis.exists(f"pw:response::{begun.id}:lease")


async def until_running(client: AsyncOpenAI, response_id: str, status: str = "in_progress") -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(NotFoundError):
                if (await client.responses.retrieve(response_id)).status == status:
                    return
            await asyncio.sleep(0.01)


async def test_a_stream_of_what_is_not_kept_any_more_says_so(bridge: Bridge) -> None:
    bridge.router.script = stalls_after(accepted(), delta("Hel"))
    stream = await bridge.openai.responses.create(model="demo", input="x", background=True, stream=True)
    events = []
    async for event in stream:
        events.append(event)
        if event.type == "response.created":
            await bridge.openai.responses.delete(event.response.id)
    assert events[-1].type == "error" and "not kept" in events[-1].message


async def test_a_stream_whose_events_are_lost_says_so(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no more room for them."""
    go_on, append, shelves = asyncio.Event(), LocalShelf.append, list[LocalShelf]()

    async def noted(self: LocalShelf, key: str, first: int, values: list[bytes], ttl_s: float) -> None:
        shelves.append(self)
        await append(self, key, first, values, ttl_s)

    monkeypatch.setattr(LocalShelf, "append", noted)
    bridge.router.script = in_two(go_on)
    stream = await bridge.openai.responses.create(model="demo", input="x", background=True, stream=True)
    events = []
    async for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            await shelves[-1].delete(f"pw:response::{events[0].response.id}:events")  # type: ignore[union-attr]
            go_on.set()
    assert events[-1].type == "error" and "not kept" in events[-1].message


async def test_what_is_wrong_is_told_at_once_or_found_later(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.router.script = refuses(ContextLength("too long", "messages"))
    assert (await ask(bridge, background=True)).json()["error"]["code"] == "context_length_exceeded"
    monkeypatch.setattr("pagewire_bridge.openai.responses.routes._ACCEPTED_S", 0.01)

    async def late(_request: GenerateRequest) -> Events:
        await asyncio.sleep(0.2)
        raise ContextLength("too long", "messages")
        yield

    bridge.router.script = late
    begun = await bridge.openai.responses.create(model="demo", input="hi", background=True)
    failed = await ended(bridge.openai, begun.id)
    assert failed.status == "failed" and failed.error and failed.error.code == "invalid_prompt"


async def test_a_bridge_that_stops_leaves_no_response_running(redis_url: str) -> None:
    async with bridge_with(redis_url=redis_url) as other:
        async with bridge_with(stalls_after(accepted(), delta("Hel")), redis_url=redis_url) as url:
            async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
                begun = await client.responses.create(model="demo", input="hi", background=True)
                assert begun.status == "queued"
                await asyncio.sleep(0.1)
        async with AsyncOpenAI(base_url=other, api_key="unused", max_retries=0) as client:
            failed = await client.responses.retrieve(begun.id)
            assert failed.status == "failed" and failed.error and "stopped" in failed.error.message


async def test_events_whose_storing_was_not_answered_are_told_once(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a Redis that stood still for longer than it is waited for, and then did what it had been sent."""
    append, num_lost = LocalShelf.append, 0

    async def unanswered(self: LocalShelf, key: str, first: int, values: list[bytes], ttl_s: float) -> None:
        nonlocal num_lost
        await append(self, key, first, values, ttl_s)
        if first and num_lost < 2:
            num_lost += 1
            raise Unavailable("no answer")

    monkeypatch.setattr(LocalShelf, "append", unanswered)
    stream = await bridge.openai.responses.create(model="demo", input="x", background=True, stream=True)
    events = [event.to_dict() async for event in stream]
    assert num_lost == 2 and read_back(events)["output"][0]["content"][0]["text"] == "Hello"
    assert await again(bridge, events[0]["response"]["id"]) == events


async def test_what_comes_while_a_bridge_stops_does_not_change_how_a_response_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, go_on, stops = list[Fields](), asyncio.Event(), False
    append, put_under = LocalShelf.append, LocalShelf.put_under

    async def slow(self: LocalShelf, key: str, first: int, values: list[bytes], ttl_s: float) -> None:
        if stops:
            go_on.set()
            await asyncio.sleep(0.1)
        await append(self, key, first, values, ttl_s)

    async def noted(self: LocalShelf, lease: str, lease_s: float, key: str, value: bytes, ttl_s: float) -> bool:
        stored.append(json.loads(value)["response"])
        return await put_under(self, lease, lease_s, key, value, ttl_s)

    monkeypatch.setattr(LocalShelf, "append", slow)
    monkeypatch.setattr(LocalShelf, "put_under", noted)
    async with bridge_with(in_two(go_on)) as url, AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        stream = await client.responses.create(model="demo", input="x", background=True, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        stops = True
    assert [(one["status"], bool(one["error"]), len(one["output"])) for one in stored[1:]] == [("failed", True, 1)]


async def test_a_response_that_is_complete_is_no_failure_of_a_bridge_that_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, put_under = list[Fields](), LocalShelf.put_under

    async def away_at_first(self: LocalShelf, lease: str, lease_s: float, key: str, value: bytes, ttl_s: float) -> bool:
        stored.append(json.loads(value)["response"])
        if [one["status"] for one in stored] == ["in_progress", "completed"]:
            raise Unavailable("no answer")
        return await put_under(self, lease, lease_s, key, value, ttl_s)

    monkeypatch.setattr(LocalShelf, "put_under", away_at_first)
    monkeypatch.setattr("pagewire_bridge.openai.responses.background._RETRY_S", 60.0)
    async with bridge_with() as url, httpx.AsyncClient() as http:
        await http.post(f"{url}/responses", json={"input": "x", "background": True})
        await eventually(lambda: len(stored) == 2)
    assert stored[2] == stored[1] and stored[2]["output"][0]["content"][0]["text"] == "Hello"


async def test_a_background_response_needs_a_store_that_answers() -> None:
    async with bridge_with(redis_url=f"redis://127.0.0.1:{free_port()}/0") as url, httpx.AsyncClient() as http:
        refused = await http.post(f"{url}/responses", json={"input": "x", "background": True})
        assert refused.status_code == 503
