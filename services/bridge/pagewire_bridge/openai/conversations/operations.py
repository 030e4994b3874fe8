"""The Conversations API in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_core.errors import InvalidRequest, Unavailable

from pagewire_bridge.openai.conversations import answer_types as answers
from pagewire_bridge.openai.conversations import routes
from pagewire_bridge.openai.conversations.schema import CreateBody, DescribeBody, ItemsBody
from pagewire_bridge.openai.responses.answer_types import ItemList
from pagewire_bridge.openai.responses.operations import PAGES
from pagewire_bridge.openapi.headers import IGNORED_FIELDS
from pagewire_bridge.openapi.operation import Api, Operation, Raises

_STORED: Raises = (InvalidRequest, Unavailable)
_ITEMS = [{"role": "user", "content": "My name is Ada."}]

API = Api(
    "OpenAI Conversations",
    "OpenAI's Conversations API: items that responses are asked with (`conversation`), and add to.",
    {
        routes.create: Operation(
            "Begins a conversation",
            CreateBody,
            answers.ConversationAnswer,
            raises=_STORED,
            headers=(IGNORED_FIELDS,),
            examples={"with an item": {"items": _ITEMS, "metadata": {"topic": "names"}}, "empty": {}},
        ),
        routes.retrieve: Operation(
            "A conversation, without its items",
            answer=answers.ConversationAnswer,
            raises=(Unavailable,),
            refuses=(404,),
        ),
        routes.describe: Operation(
            "Gives a conversation other metadata",
            DescribeBody,
            answers.ConversationAnswer,
            raises=_STORED,
            refuses=(404,),
            headers=(IGNORED_FIELDS,),
            examples={"metadata": {"metadata": {"topic": "names"}}},
        ),
        routes.delete: Operation(
            "Forgets a conversation with its items",
            answer=answers.ConversationDeleted,
            raises=(Unavailable,),
            refuses=(404,),
        ),
        routes.add_items: Operation(
            "Adds items to a conversation",
            ItemsBody,
            ItemList,
            raises=_STORED,
            refuses=(404,),
            headers=(IGNORED_FIELDS,),
            examples={"an item": {"items": _ITEMS}},
        ),
        routes.list_items: Operation(
            "The items of a conversation, in pages", answer=ItemList, raises=_STORED, refuses=(404,), query=PAGES
        ),
        routes.retrieve_item: Operation(
            "An item of a conversation", answer=dict[str, Any], raises=(Unavailable,), refuses=(404,)
        ),
        routes.delete_item: Operation(
            "Forgets an item of a conversation",
            answer=answers.ConversationAnswer,
            raises=(Unavailable,),
            refuses=(404,),
        ),
    },
)
