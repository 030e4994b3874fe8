"""Streams over HTTP, each in another style, and all that a client is told in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from cluster import Cluster
from tiny_models import VOCAB

STYLES: list[dict[str, object]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5, "n": 3},
    {"temperature": 0.9, "seed": 6, "presence_penalty": 0.8, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 7, "logprobs": 2, "n": 2},
    {"temperature": 1.1, "seed": 8, "top_p": 0.9, "min_tokens": 100, "ignore_eos": False, "stop": ["q", "zz"]},
]


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, VOCAB) for _ in range(length)]


# Of one choice: text, token ids, log probabilities, and how it ended.
Told = list[Any]


def merge(told: dict[int, Told], event: dict[str, Any]) -> None:
    """Adds what one event of a stream says of its choices."""
    for choice in event["choices"]:
        text, ids, logprobs, end = told.setdefault(choice["index"], ["", [], [], None])
        logprobs = [*logprobs, *(choice["logprobs"] or {}).get("token_logprobs", [])]
        ids = [*ids, *choice.get("token_ids", [])]
        end = end or (choice["finish_reason"], choice.get("stop_reason"))
        told[choice["index"]] = [text + choice["text"], ids, logprobs, end if choice["finish_reason"] else None]


async def stream(
    cluster: Cluster, i: int, arrived: Callable[[], object] = lambda: None, max_tokens: int = 150
) -> dict[int, Told]:
    """All that the client is told of each choice."""
    body = {"prompt": prompt_of(40 + 7 * i, i), "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True,
            "stream": True, **STYLES[i % len(STYLES)]}  # fmt: skip
    told: dict[int, Told] = {}
    lines: list[str] = []
    async with cluster.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            lines += [line.removeprefix("data: ")] if line else []
            arrived()
    assert lines[-1] == "[DONE]", lines[-1]
    for event in map(json.loads, lines[:-1]):
        assert "error" not in event, event
        merge(told, event)
    return told


def after(count: int, what: Callable[[], object]) -> Callable[[], object]:
    """Does it when it is called for the count-th time."""
    left = iter(range(count - 1, -1, -1))
    return lambda: next(left, None) == 0 and what()
