"""OpenAI's Responses API: read, find the conversation, ask the router, answer, store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pagewire_core.errors import ContextLength, InvalidRequest, Unavailable
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.blame import blaming
from pagewire_bridge.body import read_body
from pagewire_bridge.client import client_of
from pagewire_bridge.disconnect import until_disconnect
from pagewire_bridge.openai.responses.answer import encoded, events, whole
from pagewire_bridge.openai.responses.asked import Asked, store_of, understand
from pagewire_bridge.openai.responses.background import BackgroundRun, BackgroundRuns, follow
from pagewire_bridge.openai.responses.pages import page_of
from pagewire_bridge.openai.responses.store import Record
from pagewire_bridge.openai.responses.translate import CHAT_NAMES, parse_body
from pagewire_bridge.openai.translate import router_names
from pagewire_bridge.prompt_fit import cut_to_fit, num_tokens
from pagewire_bridge.respond import begin, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream

_ACCEPTED_S = 1.0  # what a refusal of a background response may take to be its answer


async def create(request: Request) -> Response:
    body = parse_body(await read_body(request))
    with blaming(CHAT_NAMES):
        asked = await understand(request, body)
        with blaming(router_names(asked.chat)):
            return await _answer(asked)


async def count_input(request: Request) -> Response:
    """In tokens, what the model would be given for the same body."""
    body = parse_body(await read_body(request))
    with blaming(CHAT_NAMES):
        asked = await understand(request, body)
        with blaming(router_names(asked.chat)):
            count = await num_tokens(client_of(request), asked.generate)
    return json_response({"object": "response.input_tokens", "input_tokens": count}, headers=asked.headers)


async def _answer(asked: Asked) -> Response:
    """A conversation that is too long is cut if it may be, and asked again; its answer may then be as long as fits."""
    answer = _in_background if asked.body.background else _in_foreground
    try:
        return await answer(asked)
    except ContextLength:
        if asked.body.truncation != "auto":
            raise
    asked.generate.clip_max_tokens = True
    if removed := await cut_to_fit(client_of(asked.request), asked.generate, None):
        asked.headers["x-pagewire-prompt-truncated"] = str(removed)
    return await answer(asked)


async def _in_foreground(asked: Asked) -> Response:
    generation, answer = begin(asked.request, [asked.generate], 1), asked.answer()

    async def answer_whole() -> Response:
        asked.accept(answer, generation)
        await whole(answer, generation)
        await asked.extend(answer)
        await asked.keep(answer)
        return json_response(answer.response, headers={**asked.headers, **served_by(generation.summaries)})

    async def told() -> AsyncGenerator[bytes]:
        """The end is stored before it is told: the client may go on from it at once."""
        for event in answer.begin():
            yield encoded(event)
        async for event in events(answer, generation):
            yield encoded(event)
        try:
            await asked.extend(answer)
        except Unavailable as error:
            answer.fail(error)
        await asked.keep(answer)
        yield encoded(answer.last())

    def answer_events() -> Response:
        asked.accept(answer, generation)
        return EventStream(told(), generation.close, asked.headers)

    stream = answer_events if asked.body.stream else None
    return await respond(asked.request, generation, stream=stream, whole=answer_whole)


async def _in_background(asked: Asked) -> Response:
    """Answers when it is accepted, or has waited for that for a while. Raises PagewireError."""
    generation = begin(asked.request, [asked.generate], 1, detached=True)
    opening = asyncio.create_task(generation.open())
    started = False
    try:
        await until_disconnect(asked.request.receive, asyncio.wait({opening}, timeout=_ACCEPTED_S))
        if opening.done():
            opening.result()
        run = BackgroundRun(asked, generation, opening)
        await run.begin()
        runs: BackgroundRuns = asked.request.state.background
        runs.start(run.run())
        started = True
    finally:
        if not started:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await generation.close()
    if asked.body.stream:
        return _followed(asked.request, asked.response_id, 0, asked.headers)
    return json_response(run.answer.response, headers=asked.headers)


def _followed(request: Request, response_id: str, first: int, headers: dict[str, str]) -> Response:
    """Whoever reads it may leave, and come back for the rest."""

    async def close() -> None:
        pass  # it goes on

    told = follow(store_of(request), request.state.tenant, response_id, first)
    return EventStream(told, close, headers)


async def retrieve(request: Request) -> Response:
    record, asked = await _found(request), request.query_params
    if asked.get("stream", "false") not in ("true", "false"):
        raise InvalidRequest("`stream` must be true or false.", "stream")
    if asked.get("stream") != "true":
        return json_response(record.response)
    after, response_id = asked.get("starting_after", ""), record.response["id"]
    if after and not (after.isdecimal() and len(after) < 10):
        raise InvalidRequest("`starting_after` must be the number of an event.", "starting_after")
    if not record.has_events:
        raise InvalidRequest("Only what was created with `background` and `stream` can be streamed again.", "stream")
    if not await store_of(request).told(request.state.tenant, response_id, 0):
        raise InvalidRequest("The events of this response are not kept any more.", "stream")
    return _followed(request, response_id, int(after) + 1 if after else 0, {})


async def delete(request: Request) -> Response:
    response_id = request.path_params["response_id"]
    if not await store_of(request).delete(request.state.tenant, response_id):
        raise _not_found(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel(request: Request) -> Response:
    """Of one that has ended: what it is."""
    record, tenant = await _found(request), request.state.tenant
    if not record.response["background"]:
        raise InvalidRequest("Only a response that was created with `background: true` can be cancelled.")
    if record.is_running:
        record.response["status"] = "cancelled"
        if not await store_of(request).change(tenant, record):
            record = await _found(request)  # it has ended in between
    return json_response(record.response)


async def input_items(request: Request) -> Response:
    """Everything that the model was given: also what came before, oldest last unless `order` says otherwise."""
    record = await _found(request)
    before = await store_of(request).conversation(request.state.tenant, record.response["previous_response_id"])
    return json_response(page_of([*before.items, *record.input], request.query_params))


async def _found(request: Request) -> Record:
    response_id = request.path_params["response_id"]
    record = await store_of(request).find(request.state.tenant, response_id)
    if record is None:
        raise _not_found(response_id)
    return record


def _not_found(response_id: str) -> HTTPException:
    return HTTPException(404, f"Response with id '{response_id}' not found.")


class _IdConvertor(StringConvertor):
    """So that what OpenAI has beside the ids, and is not here, is none of them."""

    regex = "resp_[^/]+"


register_url_convertor("response_id", _IdConvertor())
ROUTES = [
    Route("/v1/responses", create, methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input, methods=["POST"]),
    Route("/v1/responses/{response_id:response_id}", retrieve, methods=["GET"]),
    Route("/v1/responses/{response_id:response_id}", delete, methods=["DELETE"]),
    Route("/v1/responses/{response_id:response_id}/cancel", cancel, methods=["POST"]),
    Route("/v1/responses/{response_id:response_id}/input_items", input_items, methods=["GET"]),
]
