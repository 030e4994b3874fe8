"""OpenAI's Conversations API, and responses that are asked with a conversation and add to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import BadRequestError, NotFoundError
from pagewire_bridge.openai.conversations.store import ConversationStore
from pagewire_bridge.openai.responses.shelf import LocalShelf, open_shelf
from pagewire_core.errors import Unavailable
from processes import free_port
from response_events import Fields
from scripted_router import STOP, Bridge, accepted, delta, running_bridge, says, summary

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAID = ("user", "My name is Ada.")


@asynccontextmanager
async def scripted(**fields: Any) -> AsyncIterator[Bridge]:
    async with running_bridge(**fields) as bridge:
        bridge.router.script = says(accepted(), delta("Hel"), delta("lo", finish=STOP), summary())
        yield bridge


@pytest_asyncio.fixture(loop_scope="module")
async def bridge() -> AsyncIterator[Bridge]:
    async with scripted() as running:
        yield running


def message(role: str, text: str) -> Any:
    return {"type": "message", "role": role, "content": text}


def asked(bridge: Bridge) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in bridge.router.requests[-1].chat.messages]


async def test_responses_are_asked_with_a_conversation_and_add_to_it(bridge: Bridge) -> None:
    """Whole and streamed, stored or not; instructions are the request's alone."""
    openai = bridge.openai
    made = await openai.conversations.create(items=[message(*SAID)], metadata={"topic": "names"})
    assert made.id.startswith("conv_") and made.object == "conversation" and made.metadata == {"topic": "names"}
    first = await openai.responses.create(model="demo", input="Hi", conversation=made.id, instructions="Be kind.")
    assert first.conversation and first.conversation.id == made.id and first.previous_response_id is None
    assert asked(bridge) == [("system", "Be kind."), SAID, ("user", "Hi")]
    assert bridge.router.requests[-1].session_id == made.id, "one worker has its beginning in the cache"
    stream = await openai.responses.create(
        model="demo", input="More", conversation={"id": made.id}, stream=True, store=False
    )
    assert [event async for event in stream][-1].type == "response.completed"
    before = [SAID, ("user", "Hi"), ("assistant", "Hello")]
    assert asked(bridge) == [*before, ("user", "More")]
    items = [item async for item in openai.conversations.items.list(made.id, order="asc", limit=2)]
    told = [(item.role, item.content[0].text, item.status) for item in items]
    turns = [*before, ("user", "More"), ("assistant", "Hello")]
    assert told == [(role, text, "completed") for role, text in turns] and len({item.id for item in items}) == 5
    assert (await openai.responses.input_tokens.count(model="demo", input="x", conversation=made.id)).input_tokens
    assert len(asked(bridge)) and (await openai.conversations.retrieve(made.id)) == made


async def test_items_are_added_found_and_forgotten(bridge: Bridge) -> None:
    conversations = bridge.openai.conversations
    made = await conversations.create()
    added = await conversations.items.create(
        made.id, items=[message(*SAID), {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}]
    )
    assert [item.type for item in added.data] == ["message", "function_call"] and not added.has_more
    first, second = (item.id or "" for item in added.data)
    assert (await conversations.items.retrieve(first, conversation_id=made.id)) == added.data[0]
    assert (await conversations.items.delete(first, conversation_id=made.id)).id == made.id
    with pytest.raises(NotFoundError):
        await conversations.items.retrieve(first, conversation_id=made.id)
    assert [item.id async for item in conversations.items.list(made.id)] == [second]
    changed = await conversations.update(made.id, metadata={"a": "b"})
    assert changed.metadata == {"a": "b"} == (await conversations.retrieve(made.id)).metadata
    gone = await conversations.delete(made.id)
    assert gone.deleted and gone.object == "conversation.deleted"
    for call in (conversations.retrieve(made.id), conversations.delete(made.id), conversations.items.list(made.id),
                 conversations.update(made.id, metadata={}),
                 conversations.items.create(made.id, items=[message(*SAID)]),
                 bridge.openai.responses.create(model="demo", input="x", conversation=made.id)):  # fmt: skip
        with pytest.raises(NotFoundError):
            await call


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "conversation"),
        ({"previous_response_id": "resp_1"}, "conversation"),
        ({"conversation": 3}, "conversation.str"),
    ],
)
async def test_what_a_response_of_a_conversation_may_not_ask(bridge: Bridge, fields: Fields, param: str) -> None:
    made = await bridge.openai.conversations.create()
    body = {"input": "x", "conversation": made.id, **fields}
    refused = await bridge.http.post("/v1/responses", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


async def test_a_response_of_a_conversation_is_no_previous_one(bridge: Bridge) -> None:
    """What came before it is in the conversation, and would be left out."""
    made = await bridge.openai.conversations.create(items=[message(*SAID)])
    first = await bridge.openai.responses.create(model="demo", input="Hi", conversation=made.id)
    with pytest.raises(BadRequestError, match="go on with `conversation`"):
        await bridge.openai.responses.create(model="demo", input="x", previous_response_id=first.id)


@pytest.mark.parametrize(
    ("items", "param"),
    [("x", "items"), ([message(*SAID)] * 21, "items"), ([{"type": "x"}], "items[0].type"),
     ([message("user", "a"), {"id": "msg_1"}], "items[1].id")],
)  # fmt: skip
async def test_mistakes_in_items_name_their_place(bridge: Bridge, items: Any, param: str) -> None:
    made = await bridge.openai.conversations.create()
    for path in ("/v1/conversations", f"/v1/conversations/{made.id}/items"):
        refused = await bridge.http.post(path, json={"items": items})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


async def test_an_answer_that_cannot_be_added_to_its_conversation_has_failed(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one would not know of it."""
    made = await bridge.openai.conversations.create()

    async def away(*args: Any) -> bool:
        raise Unavailable("away")

    monkeypatch.setattr(LocalShelf, "push", away)
    body = {"input": "x", "conversation": made.id}
    assert (await bridge.http.post("/v1/responses", json=body)).status_code == 503
    told = (await bridge.http.post("/v1/responses", json={**body, "stream": True})).text
    last = json.loads(told.rpartition("data: ")[2])
    assert last["type"] == "response.failed" and last["response"]["error"]["message"] == "away"


async def test_without_redis_there_that_is_said() -> None:
    async with scripted(redis_url=f"redis://127.0.0.1:{free_port()}/0") as bridge:
        refused: httpx.Response = await bridge.http.post("/v1/conversations", json={})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1


async def test_a_conversation_is_kept_for_its_time_after_it_was_used(redis_url: str) -> None:
    """By any bridge; what several add at the same time is all there."""
    for shelf in (LocalShelf(), open_shelf(redis_url)):
        store = ConversationStore(shelf, 50.0)
        name = (await store.create("t", {}, [])).fields["id"]
        for i in range(3):
            assert await store.add("t", name, [{"id": f"a{i}"}])
        found = await ConversationStore(shelf, 70.0).find("t", name)
        assert found and [item["id"] for item in found.items] == ["a0", "a1", "a2"]
        assert await store.find("other", name) is None and not await store.add("other", name, [])
        assert await store.delete("t", name) and not await store.add("t", name, [{"id": "late"}])
        assert await store.find("t", name) is None, "what comes late does not make it anew"
        await shelf.close()
