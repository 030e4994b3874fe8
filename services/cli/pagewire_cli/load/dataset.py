"""Prompts from files: ShareGPT's conversations, or lines of JSON with a prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pagewire_cli.load.client import ServerUnfit, Target

# Of ShareGPT, as everybody's benchmarks have it: what is shorter or longer is left out.
_LEAST_TOKENS, _MOST_PROMPT_TOKENS, _MOST_TOKENS = 4, 1024, 2048


def custom(path: Path, output_len: int) -> list[tuple[str, int]]:
    """Lines like {"prompt": "..."}. Raises ValueError, OSError."""
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("there are no prompts in it")
    return [(prompt, output_len) for prompt in prompts]


async def sharegpt(path: Path, target: Target, count: int, output_len: int | None, seed: int) -> list[tuple[str, int]]:
    """First questions, each with the length of its answer there or `output_len`.

    Lengths are those of the server's tokenizer (/tokenize). Raises ValueError, OSError, ServerUnfit.
    """
    conversations: list[Any] = json.loads(path.read_text(encoding="utf-8"))
    random.Random(seed).shuffle(conversations)
    found: list[tuple[str, int]] = []
    for turns in (conversation["conversations"] for conversation in conversations):
        if len(turns) < 2:
            continue
        prompt, answer = str(turns[0]["value"]), str(turns[1]["value"])
        asked = await _count(target, prompt)
        answered = output_len or await _count(target, answer)
        if min(asked, answered) >= _LEAST_TOKENS and asked <= _MOST_PROMPT_TOKENS and asked + answered <= _MOST_TOKENS:
            found.append((prompt, answered))
        if len(found) == count:
            break
    if not found:
        raise ValueError("there are no conversations of a usual length in it")
    return found


async def _count(target: Target, text: str) -> int:
    body = {"model": target.model, "prompt": text, "add_special_tokens": False}
    response = await target.server.send(target.server.request("POST", "/tokenize", body))
    answer = response.json() if response.ok else None
    if not isinstance(answer, dict) or "count" not in answer:
        raise ServerUnfit("the server has no /tokenize, which the lengths of ShareGPT's conversations need")
    return int(answer["count"])
