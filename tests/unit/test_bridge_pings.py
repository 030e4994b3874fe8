"""A stream of Anthropic's API while nothing comes, as when a long prompt is computed."""

from __future__ import annotations

import asyncio
import json

import anthropic
import pytest
from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_bridge import sse
from scripted_router import STOP, Bridge, Events, Script, accepted, delta, eventually, summary

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stream": True}


def silent_for(silence_s: float) -> Script:
    """A script with a silence before its first text, and one after it."""

    async def script(_request: GenerateRequest) -> Events:
        yield accepted()
        for text in ("Hel", "lo"):
            await asyncio.sleep(silence_s)
            yield delta(text)
        yield delta(finish=STOP)
        yield summary()

    return script


async def names(bridge: Bridge) -> list[str]:
    response = await bridge.http.post("/v1/messages", json=BODY)
    return [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]


def pinging() -> list[str]:
    return [name for task in asyncio.all_tasks() if "_send_pings" in (name := repr(task.get_coro()))]


async def test_a_silent_stream_pings(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)
    bridge.router.script = silent_for(0.3)
    told = await names(bridge)
    first = told.index("content_block_delta")
    assert "ping" in told[1:first] and "ping" in told[first:]
    assert [name for name in told if name != "ping"] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    async with anthropic.AsyncAnthropic(base_url=bridge.url, api_key="unused", max_retries=0) as client:
        stream = client.messages.stream(model="demo", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        async with stream as events:
            assert "".join([text async for text in events.text_stream]) == "Hello"


async def test_a_stream_that_is_not_silent_does_not(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 30.0)
    bridge.router.script = silent_for(0.0)
    assert "ping" not in await names(bridge)


async def test_a_client_that_leaves_a_silent_stream_ends_its_pings(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)
    bridge.router.script = silent_for(30.0)
    async with bridge.http.stream("POST", "/v1/messages", json=BODY) as response:
        async for line in response.aiter_lines():
            if line == "event: ping":
                break
            assert pinging()
    await eventually(lambda: bridge.router.num_cancelled == 1 and not pinging())


async def test_all_of_the_input_is_told_at_the_beginning_and_at_the_end(bridge: Bridge) -> None:
    """By the same keys, whose sum it is; what of it came from the cache, at the end alone."""
    bridge.router.script = silent_for(0.0)
    response = await bridge.http.post("/v1/messages", json=BODY)
    lines = (json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: "))
    events = {event["type"]: event for event in lines}
    before, after = events["message_start"]["message"]["usage"], events["message_delta"]["usage"]
    assert before.keys() == after.keys()
    inputs = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert [before[name] for name in inputs] == [7, 0, 0] and [after[name] for name in inputs] == [3, 0, 4]
