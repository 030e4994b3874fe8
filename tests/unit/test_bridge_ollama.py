"""Ollama's requests as they are asked of the router."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pagewire.v1 import inference_pb2 as pb
from pagewire_bridge.answer_parser import NO_FORMAT
from pagewire_bridge.body import validated
from pagewire_bridge.ollama.schema import ChatBody
from pagewire_bridge.ollama.translate import to_chat_of
from pagewire_core.errors import InvalidRequest
from pagewire_router.sampling_limits import check_sampling
from scripted_router import Bridge

USER = {"role": "user", "content": "Count."}


def chat(*messages: dict[str, Any], **fields: Any) -> pb.GenerateRequest:
    body = validated(ChatBody, {"model": "m", "messages": [*messages] or [USER], **fields})
    return to_chat_of(body, "id", NO_FORMAT.with_tools)


@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("top_k", 3.9, "top_k", 3),
        ("top_k", -1, "top_k", 0),
        ("num_predict", 16.0, "max_tokens", 16),
        ("num_predict", -5, "max_tokens", 0),
        ("num_predict", 1e300, "max_tokens", 2**31 - 1),
        ("seed", 7.5, "seed", 7),
        ("temperature", -1, "temperature", 0.0),
        ("temperature", 2, "temperature", 2.0),
        ("top_p", 0, "top_p", pytest.approx(1e-6)),
        ("top_p", 1.5, "top_p", 1.0),
        ("min_p", -0.5, "min_p", 0.0),
        ("presence_penalty", 3, "presence_penalty", 2.0),
        ("frequency_penalty", -3.5, "frequency_penalty", -2.0),
        ("repeat_penalty", 0, "repetition_penalty", pytest.approx(1e-6)),
    ],
)
def test_any_number_is_the_nearest_that_there_is(option: str, value: float, name: str, expected: object) -> None:
    sampling = chat(options={option: value}).sampling
    assert getattr(sampling, name) == expected
    check_sampling(sampling, vocab_size=100)


def test_a_negative_context_is_the_models() -> None:
    body = validated(ChatBody, {"model": "m", "options": {"num_ctx": -1, "repeat_last_n": -7.5}})
    assert (body.asked.num_ctx, body.asked.repeat_last_n) == (0, -1)


@pytest.mark.parametrize("value", ["3", True, [3]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest):
        chat(options={"top_k": value})


def test_calls_and_results_keep_the_ids_that_tie_them() -> None:
    function = {"name": "now", "arguments": {"zone": "CET"}}
    said = {"role": "assistant", "tool_calls": [{"id": "call_7", "function": function}, {"function": function}]}
    asked = chat(USER, said, {"role": "tool", "content": "3 pm", "tool_call_id": "call_7"})
    fields = [json.loads(message.fields_json or "{}") for message in asked.chat.messages]
    assert [call["id"] for call in fields[1]["tool_calls"]] == ["call_7", None]
    assert fields[1]["tool_calls"][0]["function"] == function and fields[2] == {"tool_call_id": "call_7"}


def test_an_answer_that_the_client_began_is_continued() -> None:
    begun = {"role": "assistant", "content": "3, 4,"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now"}}]}
    assert chat(USER, begun).chat.continue_final_message
    for messages in ([USER], [begun, USER], [USER, {**begun, "content": " "}], [USER, call]):
        assert not chat(*messages).chat.continue_final_message


@pytest.mark.asyncio(loop_scope="module")
async def test_without_an_input_there_are_no_vectors_but_there_is_a_model(bridge: Bridge) -> None:
    for path, body, expected in (
        ("/api/embed", {}, []), ("/api/embed", {"input": ""}, []), ("/api/embed", {"input": []}, []),
        ("/api/embeddings", {}, []), ("/api/embeddings", {"prompt": ""}, []),
    ):  # fmt: skip
        answer = await bridge.http.post(path, json={"model": "demo", **body})
        assert answer.status_code == 200
        assert answer.json()["embeddings" if path == "/api/embed" else "embedding"] == expected
        missing = await bridge.http.post(path, json={"model": "none", **body})
        assert missing.status_code == 404 and "not found" in missing.json()["error"]
