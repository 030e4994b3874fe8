"""Prompts are in the router's log where an operator wants them there, and nowhere else."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import grpc
import pytest
from pagewire.v1 import inference_pb2
from pagewire_core.tokenizer import Tokenizer
from router_scene import request, scene
from structlog.testing import capture_logs

PROMPT = "ein Käse, zwei Käse, drei Käse"
Lines = list[MutableMapping[str, Any]]


async def told(tokenizer: Tokenizer, asked: inference_pb2.GenerateRequest, **flags: Any) -> Lines:
    """What the router logs of a request."""
    async with scene(tokenizer, "b1", **flags) as s:
        for worker in s.router.services.workers.live:
            worker.info.constraints = True
        with capture_logs() as lines:
            async for _ in s.stub.Generate(asked):
                pass
    return lines


async def test_a_prompt_is_logged_as_the_model_gets_it_with_every_parameter(byte_tokenizer: Tokenizer) -> None:
    asked = request(request_id="r1", tenant="t", n=2, sampling={"stop": ["."], "bad_words": ["no"], "max_tokens": 4})
    asked.chat.messages.add(role="user", content=PROMPT)
    asked.structured_output.regex = "[a-z]+"
    (line,) = [
        line
        for line in await told(byte_tokenizer, asked, enable_log_requests=True)
        if line["event"] == "request received"
    ]
    assert (line["request_id"], line["tenant"], line["log_level"]) == ("r1", "t", "info")
    assert PROMPT in line["prompt"] and line["prompt"] != PROMPT, "with the template's marks"
    assert byte_tokenizer.encode(line["prompt"], False) == line["prompt_token_ids"]
    assert line["num_prompt_tokens"] == len(line["prompt_token_ids"])
    params = line["params"]
    assert (params["n"], params["max_tokens"], params["stop"], params["bad_words"]) == (2, 4, ["."], ["no"])
    assert params["seed"] and "[a-z]+" in params["structured_output"], "what was drawn, and what was asked for"
    assert not {"eos_token_ids", "bad_tokens", "constraint"} & params.keys()


@pytest.mark.parametrize(("most", "shown"), [(0, ""), (6, "ein Kä"), (10**6, PROMPT)])
async def test_what_is_longer_than_max_log_len_is_cut_between_characters(
    byte_tokenizer: Tokenizer, most: int, shown: str
) -> None:
    lines = await told(byte_tokenizer, request(PROMPT), enable_log_requests=True, max_log_len=most)
    (line,) = [line for line in lines if line["event"] == "request received"]
    ids = byte_tokenizer.encode(PROMPT, True)
    assert (line["prompt"], line["prompt_token_ids"], line["num_prompt_tokens"]) == (shown, ids[:most], len(ids))


async def test_without_the_flag_no_line_has_a_prompt(byte_tokenizer: Tokenizer) -> None:
    lines = await told(byte_tokenizer, request(PROMPT, sampling={"stop": ["drei"]}))
    assert lines and "Käse" not in str(lines) and "drei" not in str(lines)


async def test_inputs_of_embeddings_are_logged_and_what_is_refused_is_not(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "b1", enable_log_requests=True) as s:
        with capture_logs() as lines:
            with pytest.raises(grpc.RpcError):  # the scripted worker knows no embeddings
                await s.stub.Embed(inference_pb2.EmbedRequest(request_id="r2", inputs=[{"text": "a"}, {"text": "b"}]))
            with pytest.raises(grpc.RpcError):
                await s.ask(PROMPT, model="another")
    shown = [(line["request_id"], line["prompt"]) for line in lines if line["event"] == "request received"]
    assert shown == [("r2", "a"), ("r2", "b")]
