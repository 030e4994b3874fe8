"""What the Conversations API answers, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class ConversationAnswer(TypedDict):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(TypedDict):
    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]
