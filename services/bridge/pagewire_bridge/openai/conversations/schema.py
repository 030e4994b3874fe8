"""The request bodies of OpenAI's Conversations API."""

from __future__ import annotations

from typing import Annotated, Any

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pagewire_bridge.openai.responses.items import InputItem, items_of
from pagewire_bridge.openai.responses.schema import Metadata

MAX_ITEMS = 20  # at once
_Described = Annotated[list[InputItem], Field(max_length=MAX_ITEMS)]


def _items(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise InvalidRequest(f"`items` must be a list of at most {MAX_ITEMS} items.", "items")
    return items_of(value, "items")


Items = Annotated[list[dict[str, Any]], PlainValidator(_items, json_schema_input_type=_Described)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class CreateBody(_Body):
    """POST /v1/conversations."""

    items: Items | None = None
    metadata: Metadata | None = None


class DescribeBody(_Body):
    """POST /v1/conversations/{conversation_id}."""

    metadata: Metadata


class ItemsBody(_Body):
    """POST /v1/conversations/{conversation_id}/items."""

    items: Items
