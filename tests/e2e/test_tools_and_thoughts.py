"""Tools and thoughts through every service, with the official client."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from cluster import Cluster, running
from jsonschema import Draft202012Validator
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel, Field
from tiny_models import CHAT_TEMPLATE, make_model

DEMO = Path(__file__).resolve().parents[2] / "models/pagewire-demo"
FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=1024", "--max-num-batched-tokens=256", "--threads=1")
pytestmark = pytest.mark.asyncio


class get_weather(BaseModel):
    city: str = Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


async def test_the_demo_model_calls_a_tool_and_the_client_parses_it(tmp_path: Path) -> None:
    """By itself, streamed, forced, and with the tool's answer sent back."""
    flags = ("--tool-call-parser=json", "--enable-auto-tool-choice")
    async with running(Cluster(DEMO, tmp_path, worker_flags=FLAGS, bridge_flags=flags)) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0) as openai:
            tool: Any = pydantic_function_tool(get_weather, description="weather")
            ask: dict[str, Any] = {"model": str(DEMO), "temperature": 0, "tools": [tool], "max_tokens": 200}
            user = {"role": "user", "content": "Call get_weather for Rome in celsius."}
            for choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
                whole = await openai.chat.completions.parse(**ask, messages=[user], tool_choice=choice)
                message = whole.choices[0].message
                assert message.tool_calls and message.content is None, message
                call = message.tool_calls[0]
                assert isinstance(call.function.parsed_arguments, get_weather)
                assert whole.choices[0].finish_reason == ("stop" if isinstance(choice, dict) else "tool_calls")
                async with openai.chat.completions.stream(**ask, messages=[user], tool_choice=choice) as stream:
                    final = (await stream.get_final_completion()).choices[0]
                assert final.message.tool_calls[0].function.arguments == call.function.arguments
                assert final.finish_reason == whole.choices[0].finish_reason
            back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
            answer = await openai.chat.completions.create(**ask, messages=[user, message.model_dump(), back])
            assert answer.usage.prompt_tokens > whole.usage.prompt_tokens
            older = {key: value for key, value in ask.items() if key != "tools"} | {"functions": [tool["function"]]}
            said = (await openai.chat.completions.create(**older, messages=[user], function_call="auto")).choices[0]
            assert said.finish_reason == "function_call" and said.message.function_call.name == "get_weather"
            assert said.message.function_call.arguments == call.function.arguments, "the same prompt, the same call"
            back = {"role": "function", "name": "get_weather", "content": "sunny"}
            again = await openai.chat.completions.create(**older, messages=[user, said.message.model_dump(), back])
            assert again.choices[0].message.content == answer.choices[0].message.content
            seeds = [
                openai.chat.completions.create(
                    **{**ask, "temperature": 1.5}, messages=[user], tool_choice="required", seed=i, n=2,
                    parallel_tool_calls=False,
                ) for i in range(4)
            ]  # fmt: skip
            for completion in await asyncio.gather(*seeds):
                for c in completion.choices:
                    [call] = c.message.tool_calls
                    get_weather.model_validate_json(call.function.arguments)


PATCH = """start: "*** Begin Patch\\n" hunk{1,2} "*** End Patch"
hunk: "*** Add File: " NAME "\\n" ("+" /[^\\n]{0,20}/ LF){1,2}
NAME: /[a-z]{1,8}/
%import common.LF
"""


async def test_a_chats_custom_tool_is_given_a_text_that_follows_its_grammar_after_thoughts(tmp_path: Path) -> None:
    """In one family whose calls end with a mark, and with no more thoughts than are allowed."""
    flags = ("--tool-call-parser=hermes", "--enable-auto-tool-choice", "--reasoning-parser=qwen3")
    patch = {"type": "grammar", "grammar": {"syntax": "lark", "definition": PATCH}}
    tools: Any = [{"type": "custom", "custom": {"name": "apply_patch", "format": patch}}]
    async with running(Cluster(DEMO, tmp_path, worker_flags=FLAGS, bridge_flags=flags)) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0) as openai:
            for seed in range(3):
                ask: dict[str, Any] = {
                    "model": str(DEMO), "tools": tools, "tool_choice": "required", "seed": seed, "max_tokens": 400,
                    "messages": [{"role": "user", "content": "Write."}], "extra_body": {"thinking_token_budget": 5},
                }  # fmt: skip
                whole = (await openai.chat.completions.create(**ask)).choices[0]
                [call] = whole.message.tool_calls
                assert whole.finish_reason == "tool_calls" and call.custom.name == "apply_patch", whole
                hunk = r"\*\*\* Add File: [a-z]{1,8}\n(\+[^\n]{0,20}\n){1,2}"
                assert re.fullmatch(rf"\*\*\* Begin Patch\n({hunk}){{1,2}}\*\*\* End Patch", call.custom.input), call
                stream = await openai.chat.completions.create(**ask, stream=True)
                pieces = [c async for chunk in stream for c in chunk.choices[0].delta.tool_calls or ()]
                assert "".join(piece.custom["input"] for piece in pieces) == call.custom.input


async def test_an_answer_has_its_form_after_thoughts_of_a_bounded_length(tmp_path: Path) -> None:
    """Random weights: they think until they are told not to, and then write JSON. One worker of both roles."""
    model = make_model(tmp_path / "model", "qwen3")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    flags = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=64", "--threads=1")
    cluster = Cluster(model, tmp_path, prefill=0, decode=0, both=1, worker_flags=flags,
                      bridge_flags=("--reasoning-parser=qwen3",))  # fmt: skip
    async with running(cluster):
        for budget in (0, 25):
            body = {
                "messages": [{"role": "user", "content": "hello"}], "temperature": 1, "seed": 4, "n": 2,
                "thinking_token_budget": budget, "structured_outputs": {"json": schema}, "max_tokens": 200,
            }  # fmt: skip
            response = await cluster.http.post("/v1/chat/completions", json=body)
            answer = response.json()
            assert response.status_code == 200, answer
            for choice in answer["choices"]:
                assert choice["finish_reason"] == "stop"
                Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
                assert bool(choice["message"].get("reasoning")) == bool(budget)
            counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert 2 * budget <= counted < 2 * (budget + len("</think>"))
            async with cluster.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
                lines = [line.removeprefix("data: ") async for line in stream.aiter_lines() if line]
            told = [["", ""], ["", ""]]
            for choice in (c for line in lines[:-1] for c in json.loads(line)["choices"]):
                told[choice["index"]][0] += choice["delta"].get("reasoning", "")
                told[choice["index"]][1] += choice["delta"].get("content", "")
            assert told == [[c["message"].get("reasoning", ""), c["message"]["content"]] for c in answer["choices"]]
