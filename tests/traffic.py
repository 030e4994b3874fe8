"""Random requests with known answers: what a single process says to each of them is what everybody must hear."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cluster import Cluster, running
from streams import STYLES, Told, merge, prompt_of

STREAM_S = 60.0  # longer than this is a hang: the worst that the failure matrix allows is half of it
FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=32", "--threads=1")


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of /v1/completions: prompts short and long, some with a common beginning, in every style."""
    rng = random.Random(seed)
    common = prompt_of(128, seed)
    bodies = []
    for i in range(count):
        own = prompt_of(rng.choice((20, 60, 150, 250)), seed * 1000 + i)
        prompt = common + own if rng.random() < 0.3 else own
        style = STYLES[i % len(STYLES)]
        max_tokens = max(rng.choice((8, 40, 90)), int(style.get("min_tokens", 0)) + 20)  # type: ignore[call-overload]
        bodies.append({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True,
                       "stream": True} | style)  # fmt: skip
    return bodies


@dataclass
class Heard:
    """What a client heard: `error` empty and `left` False where the answer is whole."""

    told: dict[int, Told] = field(default_factory=dict)
    error: str = ""
    left: bool = False

    def agrees(self, reference: dict[int, Told]) -> bool:
        """Whole answers are equal; of the others nothing is heard that the reference does not say."""
        if not self.error and not self.left:
            return self.told == reference
        return all(
            i in reference
            and text == reference[i][0][: len(text)]
            and ids == reference[i][1][: len(ids)]
            and logprobs == reference[i][2][: len(logprobs)]
            for i, (text, ids, logprobs, _) in self.told.items()
        )


async def listen(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> Heard:
    """Asks and hears the answer; leaves after some events, if told to. TimeoutError: nothing ended it in time."""
    heard = Heard()
    try:
        async with asyncio.timeout(STREAM_S), http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                heard.error = json.loads(await response.aread())["error"]["message"]
                return heard
            heard.error = "the stream ended without a word"
            async for line in response.aiter_lines():
                if leave_after == 0:
                    heard.left, heard.error = True, ""
                    return heard
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    heard.error = ""
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        heard.error = event["error"]["message"]
                        return heard
                    merge(heard.told, event)
                    leave_after = None if leave_after is None else leave_after - 1
    except httpx.TransportError as error:
        heard.error = f"{type(error).__name__}: {error}"
    return heard


async def references(model: Path, directory: Path, bodies: Sequence[dict[str, Any]]) -> list[dict[int, Told]]:
    """The answers of one worker that does everything, asked for one after the other."""
    answers = []
    async with running(Cluster(model, directory, prefill=0, decode=0, both=1, worker_flags=FLAGS)) as single:
        for body in bodies:
            heard = await listen(single.http, body)
            assert not heard.error, heard.error
            answers.append(heard.told)
    return answers
