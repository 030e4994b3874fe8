"""One request over the OpenAI API of any server, timed as its client sees it."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from pagewire_bench.stream import Response, send
from pagewire_bench.workload import Calibration, Request, random_words

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ENDPOINTS = tuple(_PATHS)
_PROBES = (16, 112)  # words; together far below any model's context
_TIMEOUT_S = 600.0  # of a request


class ServerUnfit(Exception):
    """The server cannot be measured; the message says what it lacks."""


@dataclass
class Outcome:
    """Times in seconds. `itl_s` has one value per token after the first chunk's."""

    ttft_s: float = 0.0
    e2e_s: float = 0.0
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
    """A model behind an endpoint of a server."""

    client: httpx.AsyncClient  # with the server's base URL
    model: str
    endpoint: str

    def _body(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        # ignore_eos: servers that know it give exactly max_tokens; others may end sooner.
        return {"model": self.model, **asked, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}

    async def calibrate(self, seed: int) -> Calibration:
        """Asks twice to learn how many tokens a word makes. Raises ServerUnfit, httpx.HTTPError."""
        probes: list[tuple[int, int]] = []
        for num_words in _PROBES:
            prompt = " ".join(random_words(num_words, random.Random(f"{seed}/probe")))
            response = await self.client.post(_PATHS[self.endpoint], json=self._body(prompt, 1))
            if response.status_code != httpx.codes.OK:
                raise ServerUnfit(f"the server answers {response.status_code}: {response.text[:300]}")
            try:
                probes.append((num_words, int(response.json()["usage"]["prompt_tokens"])))
            except (KeyError, TypeError, ValueError):
                raise ServerUnfit("the server does not report usage.prompt_tokens: lengths cannot be set") from None
        try:
            return Calibration.from_probes(*probes)
        except ValueError as error:
            raise ServerUnfit(f"lengths cannot be set: {error}") from None

    async def complete(self, request: Request) -> Outcome:
        """Streams one answer. Failures are in the outcome, as every server has some under load."""
        body = {
            **self._body(request.prompt, request.max_tokens),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        outcome = Outcome()
        asked = self.client.build_request("POST", _PATHS[self.endpoint], json=body)
        started = time.perf_counter()
        try:
            response = await send(asked, _TIMEOUT_S)
        except OSError as error:  # TimeoutError is one
            outcome.error = type(error).__name__
            return outcome
        if response.status != httpx.codes.OK:
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
            event = json.loads(data)
        except ValueError:
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
    share = (outcome.completion_tokens - 1) / max(1, len(chunks) - 1)
    for before, chunk in itertools.pairwise(chunks):
        tokens = share
        if chunk.total_tokens is not None and before.total_tokens is not None:
            tokens = chunk.total_tokens - before.total_tokens
        if tokens > 0:
            outcome.itl_s.extend([(chunk.at - before.at) / tokens] * max(1, round(tokens)))
