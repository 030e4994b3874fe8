"""How a prompt's own tokens are told: vLLM's list, OpenAI's echo, TGI's prefill; whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from pagewire.v1.inference_pb2 import GenerateRequest, GenerateResponse, PromptTokens, TokenText
from scripted_router import LENGTH, STOP, Bridge, Events, accepted, delta, events_of, summary, token

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def bridge(bridge: Bridge) -> Bridge:
    bridge.router.script = tells
    return bridge


def ranked(data: bytes, logprob: float, rank: int, *top: TokenText, token_id: int) -> TokenText:
    told = token(data, logprob, *top)
    told.token_id, told.rank = token_id, rank
    return told


BEST = [ranked(b"b", -0.5, 0, token_id=8), ranked(b"x", -1.5, 0, token_id=9)]
PROMPT = [
    TokenText(token_id=1, bytes=b"<s>", special=True),
    ranked(b"a\xc3", -2.0, 3, *BEST, token_id=7),
    ranked(b"\xa9b", -0.5, 1, ranked(b"\xa9b", -0.5, 0, token_id=5), BEST[1], token_id=5),
]
ANSWER = [ranked(b"c", -0.25, 0, BEST[0], token_id=6), ranked(b"</s>", -1.0, 0, BEST[0], token_id=2)]


async def tells(request: GenerateRequest) -> Events:
    """Of two tokens, the last ends the answer. The text of the prompt is `aéb`."""
    yield accepted()
    if request.HasField("prompt_logprobs"):
        for part in (PROMPT[:2], PROMPT[2:]):
            yield GenerateResponse(prompt_tokens=PromptTokens(tokens=part))
    for index in range(request.n):
        if request.echo:
            yield delta("aéb", index)
        if request.prompt_only:
            yield delta("", index, finish=LENGTH)
        else:
            yield delta("c", index, tokens=ANSWER[:1])
            yield delta("", index, tokens=ANSWER[1:], finish=STOP)
    yield summary()


def entry(logprob: float, rank: int, text: str) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


async def test_tokens_are_named_by_their_ids_when_asked(bridge: Bridge) -> None:
    """vLLM's way to tell tokens apart that print alike; bytes, places and prompt_logprobs stay what they are."""
    fields = {"return_tokens_as_token_ids": True}
    chat = (await bridge.chat(logprobs=True, top_logprobs=1, prompt_logprobs=2, **fields)).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["bytes"]) for t in content] == [("token_id:6", [*b"c"]), ("token_id:2", [*b"</s>"])]
    assert content[0]["top_logprobs"] == [{"token": "token_id:8", "logprob": -0.5, "bytes": [*b"b"]}]
    assert chat["prompt_logprobs"] == LISTED
    whole = (await bridge.complete(echo=True, logprobs=1, **fields)).json()["choices"][0]["logprobs"]
    names = [f"token_id:{token_id}" for token_id in (1, 7, 5, 6, 2)]
    assert whole["tokens"] == names and whole["text_offset"] == [0, 0, 1, 3, 4]
    assert [list(top or ()) for top in whole["top_logprobs"]] == [
        [],
        ["token_id:8", names[1]],
        [names[2]],
        ["token_id:8", names[3]],
        ["token_id:8", names[4]],
    ]
    events = events_of((await bridge.complete(echo=True, logprobs=1, stream=True, **fields)).text)
    parts = [c["choices"][0]["logprobs"] for c in events[:-1] if c["choices"][0]["logprobs"]]
    assert [name for part in parts for name in part["tokens"]] == names
    refused = (await bridge.http.post("/v1/responses", json={"input": "x", **fields})).json()
    assert refused["error"]["param"] == "return_tokens_as_token_ids"


LISTED = [
    None,
    {"7": entry(-2.0, 3, "a\ufffd"), "8": entry(-0.5, 1, "b"), "9": entry(-1.5, 2, "x")},
    {"5": entry(-0.5, 1, "\ufffdb"), "9": entry(-1.5, 2, "x")},
]


async def test_vllms_list_is_beside_the_choices_of_a_chat_and_in_those_of_completions(bridge: Bridge) -> None:
    chat = (await bridge.chat(prompt_logprobs=2)).json()
    assert chat["prompt_logprobs"] == LISTED and "prompt_logprobs" not in chat["choices"][0]
    body = (await bridge.complete(prompt=["p", "q"], n=2, prompt_logprobs=2)).json()
    assert [choice["prompt_logprobs"] for choice in body["choices"]] == [LISTED] * 4
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4
    assert all(request.prompt_logprobs == 2 for request in bridge.router.requests)
    for plain in (await bridge.chat(), await bridge.complete(echo=True, prompt_logprobs=None)):
        assert "prompt_logprobs" not in plain.text
    assert not bridge.router.requests[-1].HasField("prompt_logprobs")


ECHOED = {
    "tokens": ["<s>", "a\ufffd", "\ufffdb", "c", "</s>"],
    "token_logprobs": [None, -2.0, -0.5, -0.25, -1.0],
    "top_logprobs": [None, {"b": -0.5, "a\ufffd": -2.0}, {"\ufffdb": -0.5}, {"b": -0.5, "c": -0.25},
                     {"b": -0.5, "</s>": -1.0}],
    "text_offset": [0, 0, 1, 3, 4],
}  # fmt: skip


async def test_an_echo_with_logprobs_has_the_prompts_tokens_first(bridge: Bridge) -> None:
    """Offsets count from the text: a beginning of sequence is no part of it, and half a character is where it ends."""
    body = (await bridge.complete(echo=True, logprobs=1, n=2)).json()
    assert [choice["logprobs"] for choice in body["choices"]] == [ECHOED] * 2
    assert [choice["text"] for choice in body["choices"]] == ["aébc"] * 2
    both = (await bridge.complete(echo=True, logprobs=1, prompt_logprobs=2)).json()["choices"][0]
    assert (both["logprobs"], both["prompt_logprobs"]) == (ECHOED, LISTED), "each with as many of the best as it asked"
    assert bridge.router.requests[-1].prompt_logprobs == 2
    none = (await bridge.complete(echo=True, logprobs=0)).json()["choices"][0]["logprobs"]
    assert bridge.router.requests[-1].prompt_logprobs == 0 and bridge.router.requests[-1].HasField("prompt_logprobs")
    assert none["token_logprobs"] == ECHOED["token_logprobs"]


async def test_a_streams_chunks_add_up_to_the_whole_echo(bridge: Bridge) -> None:
    *chunks, done = events_of((await bridge.complete(echo=True, logprobs=1, n=2, stream=True)).text)
    assert done == "[DONE]"
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]  # type: ignore[index]
        assert own[0]["text"] == "aéb" and own[0]["logprobs"]["tokens"] == ECHOED["tokens"][:3]
        told = [choice["logprobs"] for choice in own if choice["logprobs"]]
        assert {name: [value for one in told for value in one[name]] for name in ECHOED} == ECHOED
        assert "".join(choice["text"] for choice in own) == "aébc"


async def test_no_tokens_at_all_may_be_asked_for_with_an_echo(bridge: Bridge) -> None:
    """As evaluation harnesses do, to have a text judged."""
    answer = await bridge.openai.completions.create(model="demo", prompt="aéb", echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("aéb", "length") and choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -2.0, -0.5] and choice.logprobs.text_offset == [0, 0, 1]
    assert bridge.router.requests[-1].prompt_only
    *chunks, _ = events_of((await bridge.complete(echo=True, logprobs=1, max_tokens=0, stream=True)).text)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "length"]  # type: ignore[index]
    assert (await bridge.complete(echo=True, max_tokens=0)).json()["choices"][0]["text"] == "aéb"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ],
)
async def test_what_cannot_be_is_a_400(bridge: Bridge, fields: dict[str, Any], param: str) -> None:
    response = await bridge.complete(**fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert not bridge.router.requests


async def test_tgis_prefill_is_the_prompt(bridge: Bridge) -> None:
    body = {"inputs": "aéb", "parameters": {"details": True, "decoder_input_details": True, "watermark": True}}
    details = (await bridge.http.post("/generate", json=body)).json()["details"]
    assert details["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": 7, "text": "a\ufffd", "logprob": -2.0},
        {"id": 5, "text": "\ufffdb", "logprob": -0.5},
    ]
    assert bridge.router.requests[-1].sampling.watermark and bridge.router.requests[-1].sampling.temperature == 0
    plain = {"inputs": "aéb", "parameters": {"details": True, "typical_p": 0.5}}
    assert (await bridge.http.post("/generate", json=plain)).json()["details"]["prefill"] == []
    asked = bridge.router.requests[-1].sampling
    assert (asked.typical_p, asked.temperature) == (0.5, 1.0), "as in TGI, it draws then"
    streamed = await bridge.http.post("/generate_stream", json=body)
    assert streamed.status_code == 422 and "decoder_input_details" in streamed.json()["error"]
