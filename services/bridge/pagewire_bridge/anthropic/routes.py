"""Anthropic's Messages API."""

from __future__ import annotations

from typing import TypeVar

from pagewire.v1.inference_pb2 import TokenizeRequest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.anthropic.answer import PING, Answer, events, whole
from pagewire_bridge.anthropic.schema import CountBody, MessagesBody
from pagewire_bridge.anthropic.translate import ignored_fields, to_chat_body
from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import client_of
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.tool_use import parser_of
from pagewire_bridge.openai.translate import to_chat, to_chat_request
from pagewire_bridge.openai.unsupported import ignored_fields_header, refuse_unsupported_in_messages
from pagewire_bridge.respond import begin, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream

Body = TypeVar("Body", MessagesBody, CountBody)


async def messages(request: Request) -> Response:
    body, answers = await _read(request, MessagesBody), request.state.answers.with_tools
    chat = to_chat_body(body, answers)
    asked = to_chat_request(chat, request.state.request_id, answers)
    asked.clip_max_tokens = True  # coding agents ask for the longest answers that any model gives
    generation = begin(request, [asked], 1)
    head = {"id": f"msg_{request.state.request_id}", "type": "message", "role": "assistant", "model": body.model}
    headers = ignored_fields_header(ignored_fields(body, answers))

    def answer() -> Answer:
        [accepted] = generation.accepted
        parser = parser_of(chat, answers, accepted.prompt_tail)
        return Answer(head, parser, bool(chat.include_reasoning), accepted.max_tokens_clipped)

    async def answer_whole() -> Response:
        content = await whole(answer(), generation)
        return json_response(content, headers={**headers, **served_by(generation.summaries)})

    def answer_events() -> Response:
        return EventStream(events(answer(), generation), generation.close, headers, ping=PING)

    return await respond(request, generation, stream=answer_events if body.stream else None, whole=answer_whole)


async def count_tokens(request: Request) -> Response:
    body = await _read(request, CountBody)
    answers = request.state.answers.with_tools
    asked = TokenizeRequest(model=to_served_name(body.model), chat=to_chat(to_chat_body(body, answers)))
    tokens = (await client_of(request).tokenize(asked)).tokens
    headers = ignored_fields_header(ignored_fields(body, answers))
    return json_response({"input_tokens": len(tokens)}, headers=headers)


async def _read(request: Request, model: type[Body]) -> Body:
    """Raises InvalidRequest."""
    fields = to_object(await read_body(request))
    refuse_unsupported_in_messages(fields)
    return validated(model, fields)


ROUTES = [
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
