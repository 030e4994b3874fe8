"""transformers' continuous batching behind /v1/completions, for comparison.

Takes token ids and streams one chunk for each token, its id as the text: no tokenizer and no template. The cache is
bounded, as transformers would else take all memory for it.

    python transformers_server.py MODEL TOKENS --port 8003
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

_PAGE_SIZE = 256
_SPARE_PAGES = 72  # one partly filled for each sequence
_MAX_BATCH_TOKENS = 2048


class Completions:
    """The endpoint over one continuous batching manager."""

    def __init__(self, model: str, total_tokens: int) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._manager = loaded.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                page_size=_PAGE_SIZE,
                num_blocks=total_tokens // _PAGE_SIZE + _SPARE_PAGES,
                max_batch_tokens=_MAX_BATCH_TOKENS,
            ),
        )
        self._manager.start()

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            usages = [usage async for usage in self._tokens(body["prompt"], body["max_tokens"])]
            return JSONResponse({"choices": [], "usage": usages[-1]})
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for usage in self._tokens(body["prompt"], body["max_tokens"]):
            yield _event({"choices": [{"index": 0, "text": "."}], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _tokens(self, prompt: list[int], max_tokens: int) -> AsyncIterator[dict[str, int]]:
        """The usage after each of the answer's tokens."""
        results: asyncio.Queue[Any] = asyncio.Queue()
        request_id = f"request-{id(results)}"
        self._manager.register_result_handler(request_id, results.put_nowait)
        self._manager.add_request(prompt, request_id, max_new_tokens=max_tokens, streaming=True)
        while True:
            result = await results.get()
            if result.error:
                raise RuntimeError(result.error)
            yield {"prompt_tokens": len(prompt), "completion_tokens": len(result.generated_tokens)}
            if result.is_finished():
                return


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("total_tokens", type=int, help="tokens of prompts and answers that are in flight at once")
    parser.add_argument("--port", type=int, default=8003)
    args = parser.parse_args()
    completions = Completions(args.model, args.total_tokens)
    app = Starlette(routes=[Route("/v1/completions", completions.complete, methods=["POST"])])
    uvicorn.run(app, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
