"""Ollama's routes for models that are served. The content type does not matter: every example posts JSON as a form."""

from __future__ import annotations

from typing import TypeVar

from pagewire.v1.inference_pb2 import GenerateRequest, Model, TokenIds, TokenizeRequest
from pagewire_core.errors import ContextLength, ModelNotFound
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import RouterClient, client_of
from pagewire_bridge.ollama import models
from pagewire_bridge.ollama.answer import Answer, line, lines, whole
from pagewire_bridge.ollama.schema import ChatBody, GenerateBody, ModelBody
from pagewire_bridge.ollama.translate import as_chat, ignored, to_chat_of, to_generate_request, to_model
from pagewire_bridge.openai.tool_use import parser_of
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.prompt_fit import cut_to_fit
from pagewire_bridge.respond import begin, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream

# Clients switch features on by the version; this is the one whose API is spoken here.
API_VERSION = "0.12.6"
_NDJSON = "application/x-ndjson"

Body = TypeVar("Body", GenerateBody, ChatBody)


async def show_version(request: Request) -> Response:
    return json_response({"version": API_VERSION})


async def tags(request: Request) -> Response:
    return json_response({"models": [models.in_list(model) for model in await client_of(request).list_models()]})


async def ps(request: Request) -> Response:
    served = await client_of(request).list_models()
    return json_response({"models": [models.running(model) for model in served if model.ready]})


async def show(request: Request) -> Response:
    body = validated(ModelBody, to_object(await read_body(request)))
    model = await find_model(request, body.model or body.name or "")
    return json_response(models.shown(model), headers=ignored_fields_header(unknown_fields(body)))


async def generate(request: Request) -> Response:
    body = validated(GenerateBody, to_object(await read_body(request)))
    if not body.prompt:
        return await _load(request, body, is_chat=False)
    asked = to_generate_request(body, request.state.request_id, request.state.answers)
    if body.context:
        await _continue(client_of(request), asked, body.context)
    return await _answer(request, body, asked, is_chat=False, with_context=not body.raw)


async def chat(request: Request) -> Response:
    body = validated(ChatBody, to_object(await read_body(request)))
    if not body.messages:
        return await _load(request, body, is_chat=True)
    asked = to_chat_of(body, request.state.request_id, request.state.answers.with_tools)
    return await _answer(request, body, asked, is_chat=True)


async def _load(request: Request, body: GenerateBody | ChatBody, *, is_chat: bool) -> Response:
    """Without a prompt a client wants the model in memory, or out of it. It is there, and it stays."""
    await find_model(request, body.model)
    answer = Answer(body.model, is_chat)
    reason = "unload" if body.unloads else "load"
    content = {**answer.head(), **answer.content(()), "done": True, "done_reason": reason}
    headers = ignored_fields_header(ignored(body))
    if body.stream is False:
        return json_response(content, headers=headers)
    return Response(line(content), headers=headers, media_type=_NDJSON)


async def _continue(client: RouterClient, asked: GenerateRequest, context: list[int]) -> None:
    """Puts the tokens of an earlier answer before the prompt."""
    tokens = (await client.tokenize(TokenizeRequest(model=asked.model, chat=asked.chat))).tokens
    asked.token_ids.CopyFrom(TokenIds(ids=[*context, *(token.id for token in tokens)]))


async def _answer(
    request: Request, body: Body, asked: GenerateRequest, *, is_chat: bool, with_context: bool = False
) -> Response:
    """A prompt that does not fit is cut, unless the client forbids it, and asked again."""
    answer = Answer(body.model, is_chat, with_context=with_context, logprobs=bool(body.logprobs))
    answer.with_thoughts = body.think is not False
    headers = ignored_fields_header(ignored(body))
    may_cut, num_ctx = body.truncate is not False, body.asked.num_ctx or None

    async def cut() -> None:
        if removed := await cut_to_fit(client_of(request), asked, num_ctx):
            answer.truncated = removed
            headers["x-pagewire-prompt-truncated"] = str(removed)

    if may_cut and num_ctx:
        await cut()
    try:
        return await _generate(request, body, asked, answer, headers)
    except ContextLength:
        if not may_cut or answer.truncated:
            raise
    await cut()
    return await _generate(request, body, asked, answer, headers)


async def _generate(
    request: Request, body: Body, asked: GenerateRequest, answer: Answer, headers: dict[str, str]
) -> Response:
    generation = begin(request, [asked], 1)

    def read() -> None:
        """How the answer is read depends on how its prompt ends."""
        if not isinstance(body, GenerateBody) or not body.raw:
            answers = request.state.answers.with_tools
            answer.parser = parser_of(as_chat(body, answers), answers, generation.accepted[0].prompt_tail)

    async def answer_whole() -> Response:
        read()
        content = await whole(answer, generation)
        return json_response(content, headers={**headers, **served_by(generation.summaries)})

    def answer_lines() -> Response:
        read()
        return EventStream(lines(answer, generation), generation.close, headers, _NDJSON)

    return await respond(request, generation, stream=None if body.stream is False else answer_lines, whole=answer_whole)


async def find_model(request: Request, name: str) -> Model:
    """Raises ModelNotFound."""
    served = await client_of(request).list_models()
    wanted = to_model(name)
    for model in served:
        if model.name == wanted or not wanted:
            return model
    raise ModelNotFound(f"'{name}' is not served here", "model")


ROUTES = [
    Route("/api/version", show_version, methods=["GET"]),
    Route("/api/tags", tags, methods=["GET"]),
    Route("/api/ps", ps, methods=["GET"]),
    Route("/api/show", show, methods=["POST"]),
    Route("/api/generate", generate, methods=["POST"]),
    Route("/api/chat", chat, methods=["POST"]),
]
