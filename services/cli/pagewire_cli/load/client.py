"""One request over the OpenAI API of any server, timed as its client sees it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from pagewire_cli.load.http import Response, Server
from pagewire_cli.load.workload import Calibration, Request, random_words

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_PROBES = (16, 112)  # words; together far below any model's context


class ServerUnfit(Exception):
    """The server cannot be measured; the message says what it lacks."""


@dataclass
class Outcome:
    """Times in seconds. `itl_s` has one value per token after the first chunk's; `tpot_s` is None for one token."""

    ttft_s: float = 0.0
    e2e_s: float = 0.0
    tpot_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Chunk:
    at: float
    total_tokens: int | None  # completion tokens so far, from servers that say so in every chunk


@dataclass(frozen=True)
class Target:
    """A model behind an endpoint of a server; `is_chat`: prompts are a user's messages."""

    server: Server
    model: str
    endpoint: str = COMPLETIONS
    is_chat: bool = False
    ignore_eos: bool = True  # servers that know it give exactly max_tokens; others may end sooner

    def _body(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        body = {"model": self.model, **asked, "max_tokens": max_tokens, "temperature": 0.0}
        return body | {"ignore_eos": True} if self.ignore_eos else body

    async def prompt_tokens(self, prompt: str) -> int:
        """As the server counts them. Raises ServerUnfit, OSError."""
        response = await self.server.send(self.server.request("POST", self.endpoint, self._body(prompt, 1)))
        if not response.ok:
            raise ServerUnfit(response.refusal)
        try:
            return int(response.json()["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError):
            raise ServerUnfit("the server does not report usage.prompt_tokens: lengths cannot be set") from None

    async def calibrate(self, seed: int) -> Calibration:
        """Asks twice to learn how many tokens a word makes. Raises ServerUnfit, OSError."""
        probes = [" ".join(random_words(count, random.Random(f"{seed}/probe"))) for count in _PROBES]
        few, many = [(count, await self.prompt_tokens(probe)) for count, probe in zip(_PROBES, probes, strict=True)]
        try:
            return Calibration.from_probes(few, many)
        except ValueError as error:
            raise ServerUnfit(f"lengths cannot be set: {error}") from None

    async def complete(self, request: Request) -> Outcome:
        """Streams one answer. Failures are in the outcome, as every server has some under load."""
        outcome = Outcome()
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        asked = self.server.request("POST", self.endpoint, self._body(request.prompt, request.max_tokens) | stream)
        started = time.perf_counter()
        try:
            response = await self.server.send(asked)
        except OSError as error:  # TimeoutError is one
            outcome.error = type(error).__name__
            return outcome
        if not response.ok:
            outcome.error = f"HTTP {response.status}" if response.status else "no response"
            return outcome
        outcome.e2e_s = response.pieces[-1].at - started if response.pieces else 0.0
        chunks = _read(response, outcome)
        if not outcome.error:
            _time(outcome, chunks, started)
        return outcome


def _read(response: Response, outcome: Outcome) -> list[_Chunk]:
    """The chunks that carried tokens; fills in usage, or the error that ended the stream."""
    chunks: list[_Chunk] = []
    for at, data in _events(response):
        if data == b"[DONE]":
            return chunks
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            outcome.error = "event is not JSON"
            return chunks
        if event.get("error"):
            outcome.error = "error event"
            return chunks
        usage = event.get("usage") or {}
        if usage:
            outcome.prompt_tokens = usage.get("prompt_tokens") or 0
            outcome.completion_tokens = usage.get("completion_tokens") or 0
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if any(_carries_tokens(choice) for choice in event.get("choices") or ()):
            chunks.append(_Chunk(at, usage.get("completion_tokens")))
    outcome.error = "stream ended without [DONE]"
    return chunks


def _events(response: Response) -> Iterator[tuple[float, bytes]]:
    """Time and data of each server-sent event (these APIs put it on one line)."""
    rest = b""
    for piece in response.pieces:
        *lines, rest = (rest + piece.body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield piece.at, line[5:].strip()


def _carries_tokens(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def _time(outcome: Outcome, chunks: list[_Chunk], started: float) -> None:
    """TTFT and one ITL per token: a gap before a chunk of k tokens counts as k gaps of a k-th of it.

    Where chunks do not say how many tokens they carry, all after the first carry the same share of the rest.
    """
    outcome.completion_tokens = outcome.completion_tokens or len(chunks)
    outcome.ttft_s = chunks[0].at - started if chunks else outcome.e2e_s
    if outcome.completion_tokens > 1 and chunks:
        outcome.tpot_s = (chunks[-1].at - chunks[0].at) / (outcome.completion_tokens - 1)
    share = (outcome.completion_tokens - 1) / max(1, len(chunks) - 1)
    for before, chunk in itertools.pairwise(chunks):
        tokens = share
        if chunk.total_tokens is not None and before.total_tokens is not None:
            tokens = chunk.total_tokens - before.total_tokens
        if tokens > 0:
            outcome.itl_s.extend([(chunk.at - before.at) / tokens] * max(1, round(tokens)))
