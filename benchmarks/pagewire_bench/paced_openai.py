"""An OpenAI server without a model that gives tokens at a fixed pace: what is behind a gateway under measurement.

    python -m pagewire_bench.paced_openai --port 9000 --ttft-ms 50 --itl-ms 100

All streams get a token in the same turn of the event loop, as from an engine's step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from pagewire_bench.paced import Pace, Ticker

MODEL = "demo"
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class PacedOpenAI:
    """ASGI application: POST /v1/chat/completions, streamed; whatever else a gateway asks for gets 200."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._ticker = Ticker(pace.itl_s)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"].endswith("/completions"):
            return await self._stream(json.loads(body), send)
        answer = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}], "model_path": MODEL})
        await _start(send, b"application/json")
        await send({"type": "http.response.body", "body": answer.encode()})

    async def _stream(self, asked: dict[str, Any], send: Send) -> None:
        most = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        await asyncio.sleep(self._pace.ttft_s)
        await _start(send, b"text/event-stream")
        for i in range(most):  # another word each time: a gateway may end an answer that repeats itself
            if i:
                await self._ticker.tick()
            delta = {"content": f" word{i}", **({"role": "assistant"} if not i else {})}
            end = "length" if i == most - 1 else None
            await _event(send, {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]})
        usage = {"prompt_tokens": 7, "completion_tokens": most, "total_tokens": 7 + most}
        await _event(send, {**head, "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _start(send: Send, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})


async def _event(send: Send, data: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(data).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    args, pace = Pace.parse(parser)
    uvicorn.run(PacedOpenAI(pace), port=args.port, log_level="warning", access_log=False, backlog=4096)  # type: ignore[arg-type]
