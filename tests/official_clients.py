"""The official client of every API, asked for the same chat: whole and streamed."""

from __future__ import annotations

from typing import Any

import anthropic
import huggingface_hub
import ollama
import openai

NUM_TOKENS = 16
EXACT = {"ignore_eos": True}


async def ask_openai(url: str, messages: Any) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        asked: Any = {
            "model": "tgi",
            "messages": messages,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "extra_body": EXACT,
        }
        whole = await client.chat.completions.create(**asked)
        parts = [
            c.choices[0].delta.content or "" async for c in await client.chat.completions.create(**asked, stream=True)
        ]
    return [whole.choices[0].message.content, "".join(parts)]


async def ask_anthropic(url: str, messages: Any) -> list[str | None]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="-", max_retries=0) as client:
        asked: Any = {"model": "tgi", "messages": messages, "max_tokens": NUM_TOKENS, "extra_body": {"temperature": 0}}
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_text()
    assert whole.content[0].type == "text"
    return [whole.content[0].text, streamed]


async def ask_ollama(url: str, messages: Any) -> list[str | None]:
    async with ollama.AsyncClient(url) as client:
        options = {"num_predict": NUM_TOKENS, "temperature": 0}
        whole = await client.chat("tgi", messages, options=options)
        parts = [
            p.message.content or "" async for p in await client.chat("tgi", messages, options=options, stream=True)
        ]
    return [whole.message.content, "".join(parts)]


async def ask_hugging_face(url: str, messages: Any) -> list[str | None]:
    async with huggingface_hub.AsyncInferenceClient(model=url) as client:
        asked: Any = {"messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": EXACT}
        whole = await client.chat_completion(**asked)
        parts = [c.choices[0].delta.content or "" async for c in await client.chat_completion(**asked, stream=True)]
    return [whole.choices[0].message.content, "".join(parts)]


EXACT = {"ignore_eos": True}
CLIENTS = {"openai": ask_openai, "anthropic": ask_anthropic, "ollama": ask_ollama, "huggingface": ask_hugging_face}
