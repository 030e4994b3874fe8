"""Ollama's embeddings."""

from __future__ import annotations

import time
from typing import Any

from pagewire_core.errors import ContextLength
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import client_of
from pagewire_bridge.ollama.routes import find_model
from pagewire_bridge.ollama.translate import to_model
from pagewire_bridge.openai.embeddings import answer_of, check_dimensions, embed, shortened


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    truncate: bool | None = None


class EmbedBody(_Body):
    """POST /api/embed."""

    input: str | list[str] | None = None
    dimensions: int | None = None


class EmbeddingsBody(_Body):
    """POST /api/embeddings, the older one."""

    prompt: str | None = None


async def embed_inputs(request: Request) -> Response:
    body, began = validated(EmbedBody, to_object(await read_body(request))), time.perf_counter_ns()
    inputs = body.input if isinstance(body.input, list) else _one(body.input)
    await check_dimensions(request, body.dimensions)
    embedded, num_tokens = await _vectors(request, body, inputs)
    vectors = [list(shortened(vector, body.dimensions)) for vector in embedded]
    total = time.perf_counter_ns() - began
    counts: dict[str, Any] = {"total_duration": total, "load_duration": 1, "prompt_eval_count": num_tokens}
    return answer_of(body, {"model": body.model, "embeddings": vectors, **counts})


async def embed_prompt(request: Request) -> Response:
    body = validated(EmbeddingsBody, to_object(await read_body(request)))
    vectors, _ = await _vectors(request, body, _one(body.prompt))
    return answer_of(body, {"embedding": vectors[0] if vectors else []})


def _one(text: str | None) -> list[str]:
    """An empty text by itself asks for the model to be loaded, as in Ollama."""
    return [text] if text else []


async def _vectors(request: Request, body: _Body, inputs: list[str]) -> tuple[list[list[float]], int]:
    """An input that is too long is cut unless the client forbids it. Raises ModelNotFound, also without an input."""
    if not inputs:
        await find_model(request, body.model)
        return [], 0
    model = to_model(body.model)
    try:
        response = await embed(request, model, inputs)
    except ContextLength:
        if body.truncate is False:
            raise
        longest = (await client_of(request).list_models())[0].max_model_len
        response = await embed(request, model, inputs, truncate_prompt_tokens=longest)
    return [list(one.vector) for one in response.embeddings], response.prompt_tokens


ROUTES = [
    Route("/api/embed", embed_inputs, methods=["POST"]),
    Route("/api/embeddings", embed_prompt, methods=["POST"]),
]
