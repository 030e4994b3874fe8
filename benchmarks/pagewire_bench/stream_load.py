"""Many streams of chats at once: a closed loop that is timed, and streams that are only held open."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pagewire_cli.load.client import CHAT, Target
from pagewire_cli.load.http import Server
from pagewire_cli.load.workload import Request

from pagewire_bench.paced import Pace
from pagewire_bench.paced_openai import MODEL

_PROMPT = "Tell me a story about Mia and a fox at the river."
_FIRST_TOKEN = re.compile(rb'"content": ?"[^"]')
_HELD_S = 60.0


@dataclass(frozen=True)
class Load:
    """streams: at once. tokens: of each answer. seconds: for which new ones are begun."""

    streams: int
    tokens: int
    seconds: float


@dataclass
class Measured:
    """ttft_s of every answer that came as it should; num_tokens of all."""

    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)


async def run(url: str, load: Load, pace: Pace) -> Measured:
    """Streams begin spread over the time that one answer takes, and stay so."""
    measured = Measured()
    until = time.perf_counter() + load.seconds
    answer_s = pace.ttft_s + load.tokens * pace.itl_s
    target = Target(Server(url), MODEL, CHAT, is_chat=True)

    async def stream(number: int) -> None:
        await asyncio.sleep(answer_s * number / load.streams)
        while time.perf_counter() < until:
            outcome = await target.complete(Request(number, _PROMPT, load.tokens))
            if outcome.error or outcome.completion_tokens != load.tokens:
                measured.errors.append(outcome.error or f"{outcome.completion_tokens} tokens")
                await asyncio.sleep(0.1)
            else:
                measured.ttft_s.append(outcome.ttft_s)
                measured.num_tokens += load.tokens

    await asyncio.gather(*(stream(i) for i in range(load.streams)))
    return measured


@asynccontextmanager
async def held(url: str, num_streams: int) -> AsyncIterator[None]:
    """So many streams that have their first token, and wait for the next."""
    host, port = url.removeprefix("http://").split(":")
    writers: list[asyncio.StreamWriter] = []

    async def begin() -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 16, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = b""
        while not _FIRST_TOKEN.search(seen):
            if not (piece := await reader.read(4096)):
                raise RuntimeError(f"a stream ended before its first token: {seen[-500:]!r}")
            seen += piece

    try:
        async with asyncio.timeout(_HELD_S):
            for _ in range(num_streams):  # one after the other: what is measured is holding them
                await begin()
        yield
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
