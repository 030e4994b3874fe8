"""Answers of the real bridge in front of a scripted router: whole and streamed, chat and completions."""

from __future__ import annotations

import pytest
from pagewire.v1.inference_pb2 import Accepted, Delta, GenerateRequest, GenerateResponse, TokenText
from pagewire_core.errors import InvalidRequest, Unavailable
from scripted_router import (
    LENGTH,
    STOP,
    Bridge,
    Events,
    accepted,
    delta,
    events_of,
    eventually,
    running_bridge,
    says,
    summary,
    token,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


async def test_a_chat_is_answered_in_openais_shape(bridge: Bridge) -> None:
    response = await bridge.chat(request_id="ask-1")
    body = response.json()
    assert body.pop("created") > 0
    assert body.pop("system_fingerprint").startswith("pagewire-")
    assert body == {
        "id": "chatcmpl-ask-1",
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }
    headers = {k: v for k, v in response.headers.items() if k.startswith("x-pagewire")}
    assert response.headers["x-request-id"] == "ask-1"
    assert headers == {
        "x-pagewire-prefill-worker": "p0",
        "x-pagewire-decode-worker": "d0",
        "x-pagewire-cached-tokens": "4",
        "x-pagewire-computed-tokens": "3",
        "x-pagewire-transferred-tokens": "6",
        "x-pagewire-transferred-bytes": "1234",
        "x-pagewire-lane": "gloo",
    }


async def test_the_official_client_streams_a_chat(bridge: Bridge) -> None:
    stream = await bridge.openai.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, None, "stop"]
    assert [c.choices[0].delta.role for c in chunks if c.choices] == ["assistant", None, None, None]
    assert [c.usage is None for c in chunks] == [True] * 4 + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.total_tokens == 10


async def test_a_stream_has_every_key_in_every_chunk_and_ends_with_done(bridge: Bridge) -> None:
    response = await bridge.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert all("finish_reason" in c["choices"][0] and "usage" not in c for c in chunks)  # type: ignore[index]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}  # type: ignore[index]
    assert chunks[-1]["choices"][0]["delta"] == {}  # type: ignore[index]


async def test_usage_is_null_until_the_last_chunk_when_asked_for(bridge: Bridge) -> None:
    response = await bridge.chat(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events_of(response.text)
    assert done == "[DONE]"
    assert all(c["usage"] is None for c in chunks)  # type: ignore[index]
    assert (last["choices"], last["usage"]) == ([], USAGE)  # type: ignore[index]


async def test_every_chunk_counts_the_tokens_so_far_when_asked_for(bridge: Bridge) -> None:
    """vLLM's; without `include_usage` it asks for nothing."""
    two = [TokenText(token_id=5), TokenText(token_id=6)]
    bridge.router.script = says(
        accepted(), delta("He", tokens=two[:1]), delta("llo", tokens=two), delta(finish=STOP), summary()
    )
    options = {"continuous_usage_stats": True}
    *chunks, last, _ = events_of(
        (await bridge.complete(stream=True, stream_options=options | {"include_usage": True})).text
    )
    so_far = [chunk["usage"] for chunk in chunks]  # type: ignore[index]
    assert [usage["completion_tokens"] for usage in so_far] == [1, 3, 3]
    assert all(u["prompt_tokens"] == 7 and u["total_tokens"] == 7 + u["completion_tokens"] for u in so_far)
    assert (last["choices"], last["usage"]) == ([], USAGE)  # type: ignore[index]
    *chunks, _ = events_of((await bridge.complete(stream=True, stream_options=options)).text)
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_ends_every_stream_where_the_server_says_so() -> None:
    """Gateways that bill by tokens cannot rely on their clients to ask."""
    async with running_bridge(always_usage=True) as bridge:
        for response in (await bridge.chat(stream=True), await bridge.complete(stream=True)):
            *_, last, done = events_of(response.text)
            assert (last["choices"], last["usage"], done) == ([], USAGE, "[DONE]")  # type: ignore[index]


async def test_two_choices_stream_side_by_side_and_each_ends_once(bridge: Bridge) -> None:
    bridge.router.script = says(
        accepted(), delta("a", 0), delta("x", 1), delta("b", 0), delta("y", 1, finish=LENGTH),
        delta("c", 0, finish=STOP), summary(),
    )  # fmt: skip
    *chunks, _done = events_of((await bridge.chat(stream=True, n=2)).text)
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    for index, text, reason in ((0, "abc", "stop"), (1, "xy", "length")):
        own = [c for c in choices if c["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == text
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [reason]
        assert own[-1]["finish_reason"]
    assert [c["index"] for c in choices if c["delta"].get("content")] == [0, 1, 0, 1, 0]


async def test_text_of_any_script_and_with_line_ends_arrives_as_it_left(bridge: Bridge) -> None:
    """Line ends inside an event would end it; only JSON's escapes keep them in."""
    text = "héllo 你好 \U0001f469\u200d\U0001f680\n\n\r\u2028data: x\x00"
    bridge.router.script = says(accepted(), delta(text), delta(finish=STOP), summary())
    chunks = await bridge.openai.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in chunks]) == text
    assert (await bridge.chat()).json()["choices"][0]["message"]["content"] == text


async def test_tokens_without_text_are_sent_only_with_logprobs(bridge: Bridge) -> None:
    half, rest = token(b"\xc3", -0.5, token(b"\xc3", -0.5)), token(b"\xa9", -1.0, token(b"e", -0.25))
    bridge.router.script = says(
        accepted(), delta(tokens=[half]), delta("é", tokens=[rest]), delta(finish=STOP), summary()
    )
    plain = events_of((await bridge.chat(stream=True)).text)
    asked = events_of((await bridge.chat(stream=True, logprobs=True, top_logprobs=1)).text)
    assert len(asked) == len(plain) + 1
    logprobs = [c["choices"][0]["logprobs"] for c in asked[1:-2]]  # type: ignore[index]
    assert logprobs[0]["content"] == [
        {
            "token": "\ufffd",
            "logprob": -0.5,
            "bytes": [0xC3],
            "top_logprobs": [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}],
        }
    ]
    assert [lp["content"][0]["bytes"] for lp in logprobs] == [[0xC3], [0xA9]]


async def test_completion_logprobs_have_one_length_and_offsets_in_characters(bridge: Bridge) -> None:
    tokens = [token(b"\xc3", -0.5), token(b"\xa9", -1.0), token(b"ab", -2.0, token(b"zz", -0.1)), token(b"c", -9e9)]
    bridge.router.script = says(
        accepted(), delta("é", tokens=tokens[:2]), delta("abc", tokens=tokens[2:], finish=LENGTH), summary()
    )
    expected = {
        "tokens": ["\ufffd", "\ufffd", "ab", "c"],
        "token_logprobs": [-0.5, -1.0, -2.0, -9999.0],
        "text_offset": [0, 0, 1, 3],
    }
    whole = (await bridge.complete(logprobs=1)).json()["choices"][0]
    assert whole["text"] == "éabc" and whole["finish_reason"] == "length"
    assert whole["logprobs"].pop("top_logprobs")[2] == {"zz": pytest.approx(-0.1), "ab": -2.0}
    assert whole["logprobs"] == expected
    *chunks, _done = events_of((await bridge.complete(logprobs=1, stream=True)).text)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]  # type: ignore[index]
    assert {key: [x for part in parts for x in part[key]] for key in expected} == expected


async def test_prompts_of_a_list_share_one_answer(bridge: Bridge) -> None:
    """index = prompt * n + choice, and usage is the sum over all prompts."""

    async def script(request: GenerateRequest) -> Events:
        yield accepted()
        for choice in range(2):
            yield delta(f"{request.text}{choice}", choice, finish=STOP)
        yield summary()

    bridge.router.script = script
    body = await bridge.openai.completions.create(model="demo", prompt=["a", "b", "c"], n=2)
    assert [(c.index, c.text) for c in body.choices] == list(enumerate(["a0", "a1", "b0", "b1", "c0", "c1"]))
    assert body.usage and (body.usage.prompt_tokens, body.usage.completion_tokens) == (21, 9)
    *chunks, done = events_of((await bridge.complete(prompt=["a", "b", "c"], n=2, stream=True)).text)
    texts = {c["choices"][0]["index"]: c["choices"][0]["text"] for c in chunks if c["choices"][0]["text"]}  # type: ignore[index]
    assert texts == dict(enumerate(["a0", "a1", "b0", "b1", "c0", "c1"])) and done == "[DONE]"


async def test_one_refused_prompt_refuses_the_whole_list_and_ends_the_others(bridge: Bridge) -> None:
    async def script(request: GenerateRequest) -> Events:
        if request.text == "bad":
            raise InvalidRequest("no", "prompt")
        yield accepted()
        while True:
            yield delta("x")

    bridge.router.script = script
    response = await bridge.complete(prompt=["a", "bad", "c"], stream=True)
    assert response.status_code == 400
    await eventually(lambda: bridge.router.num_ended == bridge.router.num_started == 3)


async def test_stop_reason_is_the_clients_own_string_or_id(bridge: Bridge) -> None:
    for more, asked, expected in (
        ({"stop_string": "END"}, {"stop": "END"}, "END"),
        ({"stop_token_id": 5}, {"stop_token_ids": [5]}, 5),
        ({"stop_token_id": 2}, {}, None),
    ):
        bridge.router.script = says(accepted(), delta("x", finish=STOP, **more), summary())
        assert (await bridge.chat(**asked)).json()["choices"][0]["stop_reason"] == expected
        *_, last, _done = events_of((await bridge.chat(stream=True, **asked)).text)
        assert last["choices"][0]["stop_reason"] == expected  # type: ignore[index]


async def test_echo_of_a_chat_puts_the_open_assistant_message_first(bridge: Bridge) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    assert (await bridge.chat(**fields)).json()["choices"][0]["message"]["content"] == "Well, Hello"
    *chunks, _done = events_of((await bridge.chat(stream=True, **fields)).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Well, Hello"  # type: ignore[index]
    assert not bridge.router.requests[0].echo and not bridge.router.requests[0].chat.add_generation_prompt


async def test_a_failure_in_the_middle_is_one_error_event_and_no_done(bridge: Bridge) -> None:
    bridge.router.script = says(accepted(), delta("Hel"))
    *_, last = events_of((await bridge.chat(stream=True)).text)
    assert last["error"]["type"] == "server_error"  # type: ignore[index]

    async def lost(_request: GenerateRequest) -> Events:
        yield accepted()
        yield delta("Hel")
        raise Unavailable("The decode worker was lost.")

    bridge.router.script = lost
    response = await bridge.chat(stream=True, stream_options={"include_usage": True})
    assert response.status_code == 200 and "[DONE]" not in response.text
    *_, text, error = events_of(response.text)
    assert text["choices"][0]["delta"] == {"content": "Hel"}  # type: ignore[index]
    assert error == {
        "error": {
            "message": "The decode worker was lost.",
            "type": "service_unavailable_error",
            "param": None,
            "code": "service_unavailable",
        }
    }


async def test_token_ids_come_with_the_text_when_asked_for(bridge: Bridge) -> None:
    """Whoever compares answers token for token needs the ids: text of half a character says little."""
    first = Delta(choice=0, tokens=[TokenText(token_id=300, bytes=b"\xf0\x9f")])  # no text yet
    rest = Delta(choice=0, text="ok", tokens=[TokenText(token_id=5, bytes=b"ok")], finish_reason=STOP)
    opening = Accepted(model="demo", prompt_tokens=2, prompt_token_ids=[8, 9])
    script = says(
        GenerateResponse(accepted=opening), GenerateResponse(delta=first), GenerateResponse(delta=rest), summary()
    )
    bridge.router.script = script
    [choice] = (await bridge.chat(return_token_ids=True)).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([300, 5], [8, 9])
    assert bridge.router.requests[-1].return_prompt_token_ids
    *chunks, _done = events_of((await bridge.chat(stream=True, return_token_ids=True)).text)
    streamed = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]  # type: ignore[index]
    assert streamed == [300, 5]
    assert "token_ids" not in (await bridge.chat()).text
