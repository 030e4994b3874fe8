"""What the real bridge answers when something is wrong: the request, the router, the client, or ourselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import orjson
import pytest
from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_bridge.client import RouterClient
from pagewire_core import errors
from scripted_router import (
    STOP,
    Bridge,
    Events,
    accepted,
    delta,
    events_of,
    eventually,
    refuses,
    running_bridge,
    says,
    stalls_after,
    summary,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/responses/compact"), ("GET", "/v1/models/")])
async def test_what_is_no_route_is_not_taken_for_a_name(bridge: Bridge, method: str, path: str) -> None:
    refused = await bridge.http.request(method, path)
    assert refused.status_code == 404
    assert refused.json()["error"]["message"] == f"Not Found: {method} {path}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code", "retry_after"),
    [
        (errors.InvalidRequest("bad", "top_p"), 400, "invalid_request_error", "top_p", None, None),
        (errors.ContextLength("too long"), 400, "invalid_request_error", None, "context_length_exceeded", None),
        (errors.ModelNotFound("no model"), 404, "invalid_request_error", "model", "model_not_found", None),
        (errors.Overloaded("full", "", 1.2), 429, "rate_limit_error", None, "rate_limit_exceeded", "2"),
        (errors.Unavailable("none"), 503, "service_unavailable_error", None, "service_unavailable", "1"),
        (errors.DeadlineExceeded("late"), 504, "timeout_error", None, "deadline_exceeded", None),
        (errors.Cancelled("gone"), 503, "service_unavailable_error", None, "service_unavailable", "1"),
        (errors.Incompatible("other"), 500, "server_error", None, "internal_error", None),
        (errors.Internal("oops"), 500, "server_error", None, "internal_error", None),
    ],
)
async def test_a_refusal_has_its_status_even_for_a_stream(
    bridge: Bridge,
    error: errors.PagewireError,
    status: int,
    kind: str,
    param: str | None,
    code: str | None,
    retry_after: str | None,
    stream: bool,
) -> None:
    bridge.router.script = refuses(error)
    response = await bridge.chat(stream=stream)
    assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)
    body = response.json()["error"]
    assert error.message in body.pop("message")
    assert body == {"type": kind, "param": param, "code": code}


async def test_context_overflow_has_the_words_that_clients_look_for(bridge: Bridge) -> None:
    for message in ("too long", "This model's maximum context length is 8 tokens."):
        bridge.router.script = refuses(errors.ContextLength(message))
        text = (await bridge.chat()).json()["error"]["message"]
        assert text.count("maximum context length") == 1


async def test_a_tgi_stream_without_a_token_ends_in_an_error(bridge: Bridge) -> None:
    bridge.router.script = says(accepted(), delta(finish=STOP), summary(0))
    answer = await bridge.http.post("/generate_stream", json={"inputs": "hi"})
    (event,) = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
    assert event == {"error": "the answer ended without a token", "error_type": "generation"}


async def test_the_official_client_raises_its_own_errors(bridge: Bridge) -> None:
    for error, expected in (
        (errors.InvalidRequest("bad"), openai.BadRequestError),
        (errors.ModelNotFound("none"), openai.NotFoundError),
        (errors.Overloaded("full"), openai.RateLimitError),
        (errors.Internal("oops"), openai.InternalServerError),
    ):
        bridge.router.script = refuses(error)
        with pytest.raises(expected):
            await bridge.openai.chat.completions.create(model="demo", messages=MESSAGES)
    bridge.router.script = says(accepted(), delta("Hel"))
    stream = await bridge.openai.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="before every choice"):
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"text"', b"null", b"[" * 5000, b"\xff\xfe", b"{}\x00",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    ],
)  # fmt: skip
async def test_a_body_that_is_not_a_json_object_is_400(bridge: Bridge, body: bytes) -> None:
    response = await bridge.http.post(CHAT, content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert not bridge.router.requests


async def test_the_content_type_does_not_matter(bridge: Bridge) -> None:
    """curl -d says x-www-form-urlencoded."""
    content = orjson.dumps({"messages": MESSAGES})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (await bridge.http.post(CHAT, content=content, headers=headers)).status_code == 200


async def test_a_body_above_the_limit_is_413(bridge: Bridge) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield b" " * (1 << 20)

    for content in (b" " * ((32 << 20) + 1), chunks()):
        response = await bridge.http.post(CHAT, content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_a_prompt_that_no_message_can_carry_is_400_and_not_429(bridge: Bridge) -> None:
    """gRPC calls it RESOURCE_EXHAUSTED, which for everyone else means: try again."""
    response = await bridge.complete(prompt="x" * (17 << 20))
    assert response.status_code == 400 and "16 MiB" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404), ("GET", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models/demo", 405), ("POST", "/health", 405),
        ("GET", "/v1/models/", 404),
    ],
)  # fmt: skip
async def test_unknown_routes_and_methods_get_error_objects(
    bridge: Bridge, method: str, path: str, status: int
) -> None:
    response = await bridge.http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert (status == 405) == ("allow" in response.headers)


async def test_a_fault_of_the_bridge_is_a_500_in_openais_shape(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: RouterClient) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(RouterClient, "list_models", broken)
    response = await bridge.http.get("/v1/models")
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error" and response.headers["x-request-id"]


async def test_a_fault_in_the_middle_of_a_stream_cuts_the_connection(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that just ended would look like a whole answer to clients that do not wait for [DONE]."""

    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("pagewire_bridge.openai.answer.usage", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        await bridge.chat(stream=True, stream_options={"include_usage": True})
    await eventually(lambda: bridge.router.num_ended == 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_ended(stream: bool) -> None:
    async with running_bridge(request_timeout_s=1.0) as bridge:
        bridge.router.script = stalls_after()
        response = await bridge.chat(stream=stream)
        assert response.status_code == 504 and "limit of 1 s" in response.json()["error"]["message"]
        await eventually(lambda: bridge.router.num_cancelled == 1)


@pytest.mark.parametrize(
    "ending", [says(), says(accepted()), says(accepted(), delta("x", finish=STOP)), says(accepted(), delta("x"))]
)
async def test_a_router_that_ends_early_never_makes_a_clean_answer(bridge: Bridge, ending: object) -> None:
    bridge.router.script = ending  # type: ignore[assignment]
    assert (await bridge.chat()).status_code == 500
    streamed = await bridge.chat(stream=True)
    assert "error" in (events_of(streamed.text)[-1] if streamed.status_code == 200 else streamed.json())


async def _raw_request(bridge: Bridge, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = bridge.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps({"messages": MESSAGES, **body}).encode()
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("events", [(), (accepted(),), (accepted(), delta("Hel"))])
async def test_a_client_that_leaves_cancels_the_call(
    bridge: Bridge, events: tuple[object, ...], stream: bool, abrupt: bool
) -> None:
    """Whether it waits for admission, for the first token, or in the middle of an answer."""
    bridge.router.script = stalls_after(*events)  # type: ignore[arg-type]
    reader, writer = await _raw_request(bridge, {"stream": stream})
    await eventually(lambda: bridge.router.num_started == 1)
    if stream and len(events) == 2:
        await reader.readuntil(b"Hel")
    assert bridge.router.num_ended == 0
    if abrupt:
        writer.transport.abort()
    else:
        writer.close()
    await eventually(lambda: bridge.router.num_cancelled == 1)


async def test_one_client_that_leaves_ends_all_prompts_of_its_list(bridge: Bridge) -> None:
    bridge.router.script = stalls_after(accepted(), delta("x"))
    asking = asyncio.create_task(bridge.complete(prompt=["a", "b", "c"]))
    await eventually(lambda: bridge.router.num_started == 3)
    asking.cancel()
    await eventually(lambda: bridge.router.num_cancelled == 3)


async def test_clients_that_left_are_counted_as_such(bridge: Bridge) -> None:
    bridge.router.script = stalls_after(accepted(), delta("x"))
    for stream in (False, True):
        _reader, writer = await _raw_request(bridge, {"stream": stream})
        await eventually(lambda: bridge.router.num_started > bridge.router.num_ended)
        writer.close()
        await eventually(lambda: bridge.router.num_started == bridge.router.num_ended)
    text = (await bridge.http.get("/metrics")).text
    assert f'route="{CHAT}",status="499"' in text
    assert 'pagewire_bridge_requests_in_flight{instance="bridge"} 1.0' in text


async def test_pipelined_requests_on_one_connection_are_all_answered(bridge: Bridge) -> None:
    """The watch for a disconnect reads the connection; it must not swallow the next request."""
    reader, writer = await _raw_request(bridge, {})
    data = json.dumps({"messages": MESSAGES, "stream": True}).encode()
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    received = await reader.readuntil(b"[DONE]")
    assert received.count(b"HTTP/1.1 200") == 2
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_with_a_request_waiting_cancels_the_one_that_runs(
    bridge: Bridge, stream: bool
) -> None:
    async def endless(_request: GenerateRequest) -> Events:
        yield accepted()
        while True:
            yield delta("x")
            await asyncio.sleep(0.01)

    bridge.router.script = endless
    _reader, writer = await _raw_request(bridge, {"stream": stream})
    await eventually(lambda: bridge.router.num_started > bridge.router.num_ended)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await eventually(lambda: bridge.router.num_started == bridge.router.num_ended)


async def test_without_a_router_requests_are_503_and_the_bridge_stays(bridge: Bridge) -> None:
    """Last in this file: the router does not come back."""
    await bridge.router_server.stop()
    for response in (await bridge.chat(), await bridge.chat(stream=True), await bridge.http.get("/v1/models")):
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert "127.0.0.1" not in response.text
    assert (await bridge.http.get("/health")).status_code == 503
    assert (await bridge.http.get("/metrics")).status_code == 200
    assert (await bridge.http.get("/version")).status_code == 200
