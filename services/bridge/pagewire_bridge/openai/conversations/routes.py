"""OpenAI's Conversations API."""

from __future__ import annotations

from pagewire_core.errors import InvalidRequest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.openai.conversations.schema import CreateBody, DescribeBody, ItemsBody
from pagewire_bridge.openai.conversations.store import Conversation, complete
from pagewire_bridge.openai.responses.asked import conversation_of, conversations_of, no_conversation, store_of
from pagewire_bridge.openai.responses.items import Fields
from pagewire_bridge.openai.responses.pages import page_of
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.responses import json_response


async def create(request: Request) -> Response:
    body = validated(CreateBody, to_object(await read_body(request)))
    items = await _resolved(request, body.items or [])
    made = await conversations_of(request).create(request.state.tenant, body.metadata or {}, items)
    return json_response(made.fields, headers=ignored_fields_header(unknown_fields(body)))


async def retrieve(request: Request) -> Response:
    return json_response((await _found(request)).fields)


async def describe(request: Request) -> Response:
    """With other metadata."""
    body = validated(DescribeBody, to_object(await read_body(request)))
    fields = {**(await _found(request)).fields, "metadata": body.metadata}
    if not await conversations_of(request).describe(request.state.tenant, fields):
        raise no_conversation(fields["id"])
    return json_response(fields, headers=ignored_fields_header(unknown_fields(body)))


async def delete(request: Request) -> Response:
    name = request.path_params["conversation_id"]
    if not await conversations_of(request).delete(request.state.tenant, name):
        raise no_conversation(name)
    return json_response({"id": name, "object": "conversation.deleted", "deleted": True})


async def add_items(request: Request) -> Response:
    body = validated(ItemsBody, to_object(await read_body(request)))
    conversation = await _found(request)
    items = complete(await _resolved(request, body.items))
    if twice := [item["id"] for item in items if conversation.item(item["id"])]:
        raise InvalidRequest(f"There is an item with the id '{twice[0]}' already.", "items")
    if items and not await conversations_of(request).add(request.state.tenant, conversation.fields["id"], items):
        raise no_conversation(conversation.fields["id"])
    told = page_of(items, {"order": "asc", "limit": "100"})
    return json_response(told, headers=ignored_fields_header(unknown_fields(body)))


async def list_items(request: Request) -> Response:
    return json_response(page_of((await _found(request)).items, request.query_params))


async def retrieve_item(request: Request) -> Response:
    _, item = await _found_item(request)
    return json_response(item)


async def delete_item(request: Request) -> Response:
    """Answers with the conversation."""
    conversation, item = await _found_item(request)
    if not await conversations_of(request).remove(request.state.tenant, conversation.fields["id"], item["id"]):
        raise no_conversation(conversation.fields["id"])
    return json_response(conversation.fields)


async def _resolved(request: Request, items: list[Fields]) -> list[Fields]:
    return await store_of(request).resolved(request.state.tenant, items, "items")


async def _found(request: Request) -> Conversation:
    return await conversation_of(request, request.path_params["conversation_id"])


async def _found_item(request: Request) -> tuple[Conversation, Fields]:
    conversation, name = await _found(request), request.path_params["item_id"]
    item = conversation.item(name)
    if item is None:
        raise HTTPException(404, f"Item with id '{name}' not found.")
    return conversation, item


class _IdConvertor(StringConvertor):
    regex = "conv_[^/]+"


register_url_convertor("conversation_id", _IdConvertor())
_ONE = "/v1/conversations/{conversation_id:conversation_id}"
_ITEM = f"{_ONE}/items/{{item_id}}"
ROUTES = [
    Route("/v1/conversations", create, methods=["POST"]),
    Route(_ONE, retrieve, methods=["GET"]),
    Route(_ONE, describe, methods=["POST"]),
    Route(_ONE, delete, methods=["DELETE"]),
    Route(f"{_ONE}/items", add_items, methods=["POST"]),
    Route(f"{_ONE}/items", list_items, methods=["GET"]),
    Route(_ITEM, retrieve_item, methods=["GET"]),
    Route(_ITEM, delete_item, methods=["DELETE"]),
]
