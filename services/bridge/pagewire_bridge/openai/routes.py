"""The OpenAI endpoints: read, validate, ask the router, answer."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_core.errors import ModelNotFound
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.blame import blaming
from pagewire_bridge.body import read_body
from pagewire_bridge.client import client_of
from pagewire_bridge.generation import Generation
from pagewire_bridge.openai.answer import Answer, StreamedUsage, whole
from pagewire_bridge.openai.body import ignored_fields, parse_body
from pagewire_bridge.openai.prompts import Echo
from pagewire_bridge.openai.schema import ChatBody, CompletionBody, GenerationBody
from pagewire_bridge.openai.shapes import ChatShape, CompletionShape, Naming, Shape, id_of, text_of
from pagewire_bridge.openai.tool_use import parser_of
from pagewire_bridge.openai.tools import NAMED
from pagewire_bridge.openai.translate import (
    chat_echo,
    from_model,
    from_models,
    router_names,
    to_chat_request,
    to_completion_requests,
)
from pagewire_bridge.openai.unsupported import ignored_fields_header
from pagewire_bridge.respond import begin, name_request, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream

_FINGERPRINT = f"pagewire-{version('pagewire')}"  # read once: looking it up takes half a millisecond


async def chat_completions(request: Request) -> Response:
    return await answer_chat(request, await read_body(request))


async def completions(request: Request) -> Response:
    return await answer_completion(request, await read_body(request))


async def answer_chat(request: Request, data: bytes) -> Response:
    body = parse_body(ChatBody, data)
    asked = [to_chat_request(body, name_request(request, body.request_id), request.state.answers)]
    return await _generate(request, body, asked, ChatShape(chat_echo(body), _naming(body), bool(body.functions)))


async def answer_completion(request: Request, data: bytes) -> Response:
    body = parse_body(CompletionBody, data)
    asked = to_completion_requests(body, name_request(request, body.request_id))
    return await _generate(request, body, asked, CompletionShape(_naming(body)))


async def list_models(request: Request) -> Response:
    return json_response(from_models(await client_of(request).list_models()))


async def retrieve_model(request: Request) -> Response:
    name = request.path_params["model"]
    if not name:
        raise HTTPException(404)
    for model in await client_of(request).list_models():
        if model.name == name:
            return json_response(from_model(model))
    raise ModelNotFound(f"The model `{name}` does not exist.", "model")


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
]


def _naming(body: GenerationBody) -> Naming:
    return id_of if body.return_tokens_as_token_ids else text_of


def _head(request: Request, shape: Shape, model: str, tier: str | None) -> dict[str, Any]:
    return {
        "id": shape.id_prefix + request.state.request_id,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": _FINGERPRINT,
        **({"service_tier": "default" if tier == "auto" else tier} if tier else {}),
    }


def _reading(request: Request, body: GenerationBody, generation: Generation) -> dict[str, Any]:
    """What else an Answer to a chat is made with: parsers, where the model's text is more than content."""
    if not isinstance(body, ChatBody):
        return {}
    answers, tail = request.state.answers, generation.accepted[0].prompt_tail
    parsers = [parser for _ in range(body.n or 1) if (parser := parser_of(body, answers, tail))]
    named = isinstance(body.tool_choice, NAMED)
    thoughts = body.include_reasoning is not False
    return {
        "parsers": parsers, "named_tool": named, "functions": bool(body.functions), "include_reasoning": thoughts
    }  # fmt: skip


def _echo(body: GenerationBody, shape: Shape, generation: Generation) -> Echo | None:
    if not (isinstance(body, CompletionBody) and isinstance(shape, CompletionShape)) or body.echoed_logprobs is None:
        return None
    return Echo(shape, generation.prompt_tokens, body.n or 1, body.echoed_logprobs)


async def _generate(request: Request, body: GenerationBody, asked: list[GenerateRequest], shape: Shape) -> Response:
    n = body.n or 1
    generation = begin(request, asked, n)
    headers = ignored_fields_header(ignored_fields(body))

    def answer() -> Answer:
        accepted = generation.accepted
        return Answer(
            shape=shape,
            head=_head(request, shape, accepted[0].model or body.model or "", body.service_tier),
            num_choices=len(asked) * n,
            logprobs=asked[0].sampling.HasField("logprobs"),
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            prompt_token_ids=[list(one.prompt_token_ids) for one in accepted] if body.return_token_ids else None,
            prompt_logprobs=body.prompt_logprobs,
            echo=_echo(body, shape, generation),
            **_reading(request, body, generation),
        )

    async def answer_whole() -> Response:
        content = await whole(answer(), generation)
        return json_response(content, headers={**headers, **served_by(generation.summaries)})

    def answer_stream() -> Response:
        told = StreamedUsage.asked(body.stream_options, request.state.always_usage)
        return EventStream(answer().stream(generation, told), generation.close, headers)

    with blaming(router_names(body)):
        return await respond(request, generation, stream=answer_stream if body.stream else None, whole=answer_whole)
