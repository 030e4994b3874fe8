"""POST /inference/v1/generate: token ids in, token ids out, whole and streamed, and what is refused by which name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pagewire.v1.inference_pb2 import GenerateRequest, GenerateResponse, PromptTokens, TokenText
from pagewire_core.errors import InvalidRequest, Unavailable
from scripted_router import LENGTH, STOP, Bridge, Events, accepted, delta, events_of, refuses, says, summary

pytestmark = pytest.mark.asyncio(loop_scope="module")


def token(token_id: int, logprob: float = -1.0, *top: TokenText) -> TokenText:
    return TokenText(token_id=token_id, bytes=b"\xc3", logprob=logprob, rank=2, top=top)


async def tells(request: GenerateRequest) -> Events:
    """Two choices by turns; the text comes when it is whole, which is no affair of the tokens."""
    yield accepted()
    if request.HasField("prompt_logprobs"):
        prompt = [TokenText(token_id=5, bytes=b"a"), token(6, -0.5, token(6, -0.5), token(7, -2.0))]
        yield GenerateResponse(prompt_tokens=PromptTokens(tokens=prompt))
    for index in range(request.n):
        yield delta("", index, tokens=[token(10 + index, -0.25, token(9, -0.1))])
    for index in range(request.n):
        yield delta("é", index, tokens=[token(20 + index), token(2)], finish=STOP if index else LENGTH)
    yield summary(6)


@pytest.fixture
def bridge(bridge: Bridge) -> Bridge:
    bridge.router.script = tells
    return bridge


async def ask(bridge: Bridge, sampling: dict[str, Any] | None = None, **fields: Any) -> httpx.Response:
    body = {"token_ids": [5, 6], "sampling_params": sampling or {}, **fields}
    return await bridge.http.post("/inference/v1/generate", json=body)


async def test_the_answer_is_token_ids(bridge: Bridge) -> None:
    answer = await ask(bridge, {"n": 2}, request_id="mine")
    usage = answer.json().pop("usage")
    assert answer.json() == {
        "request_id": "mine",
        "choices": [
            {"index": 0, "token_ids": [10, 20, 2], "logprobs": None, "finish_reason": "length"},
            {"index": 1, "token_ids": [11, 21, 2], "logprobs": None, "finish_reason": "stop"},
        ],
        "prompt_logprobs": None,
        "kv_transfer_params": None,
        "usage": usage,
    }
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 6)
    assert answer.headers["x-pagewire-decode-worker"] == "d0" and answer.headers["x-request-id"] == "mine"
    [asked] = bridge.router.requests
    assert list(asked.token_ids.ids) == [5, 6] and asked.n == 2 and asked.sampling.max_tokens == 16


async def test_streamed_tokens_add_up_to_the_whole(bridge: Bridge) -> None:
    sampling = {"n": 2, "logprobs": 1}
    whole = (await ask(bridge, sampling, request_id="mine")).json()
    text = (await ask(bridge, sampling, request_id="mine", stream=True, stream_options={"include_usage": True})).text
    *chunks, last, done = events_of(text)
    assert done == "[DONE]" and {chunk["request_id"] for chunk in (*chunks, last)} == {"mine"}
    assert last["choices"] == [] and last["usage"] == whole["usage"] and last["pagewire"]["decode_worker"] == "d0"
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert [t for part in parts for t in part["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts] == [None, choice["finish_reason"]]


async def test_a_chunk_counts_the_tokens_so_far_when_asked_for(bridge: Bridge) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _, _ = events_of((await ask(bridge, {"n": 2}, stream=True, stream_options=options)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 4, 6]


async def test_tokens_are_named_by_their_ids(bridge: Bridge) -> None:
    """A piece of a character has no text of its own."""
    answer = (await ask(bridge, {"logprobs": 1, "prompt_logprobs": 1})).json()
    first, *_ = answer["choices"][0]["logprobs"]["content"]
    assert first["token"] == "token_id:10" and first["logprob"] == -0.25 and first["bytes"] == [0xC3]
    assert [top["token"] for top in first["top_logprobs"]] == ["token_id:9"]
    assert answer["prompt_logprobs"] == [None, {"6": {"logprob": -0.5, "rank": 2, "decoded_token": "\ufffd"}}]
    assert bridge.router.requests[0].sampling.logprobs == 1 and bridge.router.requests[0].prompt_logprobs == 1


async def test_every_parameter_reaches_the_router(bridge: Bridge) -> None:
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "max_tokens": 9, "min_tokens": 2,
        "stop": "x", "stop_token_ids": [4], "ignore_eos": True, "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "logit_bias": {"8": 2}, "allowed_token_ids": [8, 4], "bad_words": ["bad"],
        "logprobs": 0, "logprob_token_ids": [8], "structured_outputs": {"choice": ["yes"]},
    }  # fmt: skip
    await ask(bridge, sampling, model="demo", cache_salt="s", priority=-2)
    await bridge.http.post("/v1/completions", json={"prompt": [5, 6], **sampling, "cache_salt": "s", "priority": -2})
    by_tokens, by_completions = bridge.router.requests
    assert by_tokens.sampling == by_completions.sampling
    assert by_tokens.structured_output == by_completions.structured_output
    assert (by_tokens.cache_salt, by_tokens.priority, by_tokens.model) == ("s", -2, "demo")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling_params": None}, "sampling_params"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "text"}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids[0]"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"stop": [""]}}, "sampling_params.stop"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"min_tokens": 17}}, "sampling_params.min_tokens"),
        ({"sampling_params": {"logprob_token_ids": [1]}}, "sampling_params.logprob_token_ids"),
        ({"sampling_params": {"prompt_logprobs": 1}, "stream": True}, "sampling_params.prompt_logprobs"),
        ({"sampling_params": {"repetition_detection": {}}}, "sampling_params.repetition_detection"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"features": {"mm_hashes": {}}}, "features"),
        ({"request_id": "not sane\n"}, "request_id"),
    ],
)
async def test_what_is_wrong_is_named_by_its_place(bridge: Bridge, fields: dict[str, Any], param: str) -> None:
    refused = await ask(bridge, **{"sampling": None, **fields})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert not bridge.router.requests


@pytest.mark.parametrize(("param", "place"), [("logprobs", "sampling_params.logprobs"), ("prompt", "token_ids")])
async def test_what_the_router_refuses_is_named_by_its_place(bridge: Bridge, param: str, place: str) -> None:
    bridge.router.script = refuses(InvalidRequest("This is too much.", param))
    refused = await ask(bridge, {"logprobs": 500})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == place


async def test_what_has_no_effect_is_named_in_a_header(bridge: Bridge) -> None:
    answer = await ask(bridge, {"detokenize": False}, kv_transfer_params={"a": 1})
    assert answer.headers["x-pagewire-ignored-fields"] == "kv_transfer_params,sampling_params.detokenize"


async def test_a_failed_stream_ends_in_an_error_and_not_well(bridge: Bridge) -> None:
    failure = GenerateResponse(error=Unavailable("gone").to_proto())
    bridge.router.script = says(accepted(), delta("", tokens=[token(10)]), failure)
    text = (await ask(bridge, stream=True)).text
    chunk, error = events_of(text)
    assert chunk["choices"][0]["token_ids"] == [10] and error["error"]["message"] == "gone"
    assert "[DONE]" not in text
