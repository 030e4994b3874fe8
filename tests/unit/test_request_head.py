"""Heads and bodies that are too large, too slow or no HTTP, on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_bridge import body, main, request_head
from scripted_router import (
    STOP,
    Bridge,
    Events,
    Script,
    accepted,
    delta,
    eventually,
    running_bridge,
    says,
    stalls_after,
    summary,
)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with running_bridge() as running:
        yield running
        assert (await running.http.get("/version")).status_code == 200  # whatever came before


async def send(bridge: Bridge, *parts: bytes, limit_s: float = 10.0) -> tuple[int, dict[str, str]]:
    """Status and error of what is answered to raw bytes; the connection must then end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0)
        async with asyncio.timeout(limit_s):
            answer = await reader.read()
    finally:
        writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head and b"connection: close" in head
    return int(head.split()[1]), json.loads(content)["error"]


BEGIN = b"GET /version HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ((BEGIN, b"a: " + b"x" * (1 << 20)), 431, "headers_too_large"),  # one header without an end
        ((BEGIN, b"a" * (1 << 20)), 431, "headers_too_large"),  # one name without an end
        ((BEGIN, *[b"h%d: x\r\n" % i for i in range(300)], b"\r\n"), 431, "headers_too_large"),
        ((BEGIN, *[b"h%d: %s\r\n" % (i, b"x" * 4000) for i in range(20)], b"\r\n"), 431, "headers_too_large"),
        ((b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",), 414, "uri_too_long"),
        ((b"GET /" + b"x" * 200_000,), 414, "uri_too_long"),
        ((b"\x16\x03\x01\x02\x00\x01" + bytes(600),), 400, None),  # TLS to a plain port
        ((b"NONSENSE\r\n\r\n",), 400, None),
        ((BEGIN + b"content-length: -1\r\n\r\n",), 400, None),
    ],
)
async def test_a_head_beyond_its_limits_is_an_openai_error(
    bridge: Bridge, parts: tuple[bytes, ...], status: int, code: str | None
) -> None:
    found, error = await send(bridge, *parts)
    assert (found, error["type"], error["code"]) == (status, "invalid_request_error", code)


async def test_what_is_large_but_allowed_is_answered(bridge: Bridge) -> None:
    headers = {f"x-{i}": "x" * 200 for i in range(200)}
    for _ in range(3):  # on one connection
        assert (await bridge.http.get("/version?" + "q" * 10_000, headers=headers)).status_code == 200
        response = await bridge.http.post("/v1/completions", content=b"[" + b" " * 1_000_000 + b"]")
        assert "must be a JSON object" in response.json()["error"]["message"]


async def test_a_head_that_does_not_come_ends_the_connection(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_head, "HEAD_S", 0.2)
    for parts in ((), (BEGIN,), (b"\r\n",)):
        status, error = await send(bridge, *parts, limit_s=5)
        assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("cut", [0, 1, 60, 200, 260])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_offer_of_another_protocol_is_declined_and_its_request_answered(
    bridge: Bridge, cut: int, chunked: bool
) -> None:
    """Java's HttpClient makes one with every request, to go on in HTTP/2."""
    offer = b"host: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    content, asked = b'{"prompt": "Tokyo", "max_tokens": 3}', b""
    if chunked:
        body_of = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    else:
        body_of = b"content-length: %d\r\n\r\n%s" % (len(content), content)
    for _ in range(2):
        asked += b"POST /v1/completions HTTP/1.1\r\n" + offer + body_of + b"GET /version HTTP/1.1\r\n" + offer + b"\r\n"
    asked += b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    bridge.router.script = says(accepted(), delta("Yes", finish=STOP), summary())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
    for part in (asked[:cut], asked[cut:]):
        writer.write(part)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        answers = (await reader.read()).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200", b"200", b"200", b"404"]
    assert [b'"Yes"' in answer for answer in answers] == [True, False, True, False, False]
    assert [request.text for request in bridge.router.requests[-2:]] == ["Tokyo", "Tokyo"]
    writer.close()


async def begun_answer(bridge: Bridge, script: Script) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a stream has begun."""
    bridge.router.script = script
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
    content = b'{"prompt": "x", "stream": true}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
    await reader.readuntil(b"data: ")
    return reader, writer


async def test_a_line_after_a_body_ends_no_answer(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients send one. That no head comes after it is told when the answer is complete."""
    monkeypatch.setattr(request_head, "HEAD_S", 0.1)
    go_on = asyncio.Event()

    async def script(_request: GenerateRequest) -> Events:
        yield accepted()
        yield delta("x")
        await go_on.wait()
        yield delta("y", finish=STOP)
        yield summary()

    reader, writer = await begun_answer(bridge, script)
    writer.write(b"\r\n")
    await asyncio.sleep(0.25)
    go_on.set()
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"HTTP/1.1" not in answer and (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_what_is_no_http_is_told_in_no_answer(bridge: Bridge) -> None:
    reader, writer = await begun_answer(bridge, stalls_after(accepted(), delta("x")))
    writer.write(b"NONSENSE\r\n\r\n")
    async with asyncio.timeout(10):
        try:
            assert b"HTTP/1.1" not in await reader.read()
        except ConnectionResetError:
            pass
    await eventually(lambda: bridge.router.num_cancelled == 1)
    writer.close()


@pytest.mark.parametrize("comes", [b"", b"x", b"x" * 100])
async def test_a_body_that_nobody_waits_for_keeps_no_connection(monkeypatch: pytest.MonkeyPatch, comes: bytes) -> None:
    """Not at all, in drips, or whole, after the answer that did not need it."""
    monkeypatch.setattr(main, "KEEP_ALIVE_S", 1)
    async with running_bridge() as bridge:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
        writer.write(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405")

        async def drip() -> None:
            while comes:
                writer.write(comes)
                await asyncio.sleep(0.1 if len(comes) < 100 else 60)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(5):
            await reader.read()
        dripping.cancel()
        writer.close()


async def test_an_answer_is_not_cut_off_by_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "KEEP_ALIVE_S", 1)
    async with running_bridge() as bridge:

        async def script(_request: GenerateRequest) -> Events:
            yield accepted()
            await asyncio.sleep(1.5)
            yield delta("x", finish=STOP)
            yield summary()

        bridge.router.script = script
        reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
        writer.write(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405")
        content = b'{"prompt": "x", "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
        writer.write(b"x" + head + content)
        async with asyncio.timeout(5):
            await reader.readuntil(b"data: [DONE]")
        writer.close()


async def test_a_body_that_does_not_come_ends_the_request(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_BODY_S", 0.2)

    async def drips() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(2)
        yield b"}"

    response = await bridge.http.post("/v1/completions", content=drips())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks_and_no_interim_answer(bridge: Bridge, streamed: bool) -> None:
    bridge.router.script = says(accepted(), delta("a"), delta("b", finish=STOP), summary())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bridge.url.rpartition(":")[2]))
    content = json.dumps({"prompt": "x", "stream": streamed}).encode()
    writer.write(b"POST /v1/completions HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(content))
    writer.write(content)
    async with asyncio.timeout(10):
        head, _, told = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head and (b"content-length: %d\r\n" % len(told) in head) is not streamed
    if streamed:
        *events, done, _ = told.split(b"\n\n")
        texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
        assert "".join(texts) == "ab" and done == b"data: [DONE]"
    else:
        assert json.loads(told)["choices"][0]["text"] == "ab"
