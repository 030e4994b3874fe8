"""Conversations that clients name: items that responses are asked with, and add to.

    pw:conversation:TENANT:ID   a list of entries, each of them one of
        {"conversation": ...}   what it is; the last one counts
        {"items": [...]}        that were added together
        {"removed": ID}         an item

Nothing in it is ever changed, so bridges may write at the same time. For another tenant a conversation does not exist.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pagewire_bridge.json_text import MAX_DEPTH, read, written
from pagewire_bridge.openai.responses.items import Fields, with_ids
from pagewire_bridge.openai.responses.shelf import Shelf

_ID = re.compile(r"conv_[0-9a-f]{32}")


@dataclass(frozen=True)
class Conversation:
    """fields: what clients are told of it."""

    fields: Fields
    items: list[Fields]

    def item(self, item_id: str) -> Fields | None:
        return next((item for item in self.items if item["id"] == item_id), None)


class ConversationStore:
    """ttl_s: how long a conversation is kept after it was used. Everything raises Unavailable."""

    def __init__(self, shelf: Shelf, ttl_s: float) -> None:
        self._shelf, self._ttl_s = shelf, ttl_s

    async def create(self, tenant: str, metadata: dict[str, str], items: Sequence[Fields]) -> Conversation:
        name = f"conv_{uuid.uuid4().hex}"
        fields = {"id": name, "object": "conversation", "created_at": int(time.time()), "metadata": metadata}
        made = Conversation(fields, complete(items))
        entries = [written({"conversation": fields}), written({"items": made.items})]
        await self._shelf.append(_key(tenant, name), 0, entries, self._ttl_s)
        return made

    async def find(self, tenant: str, conversation_id: str) -> Conversation | None:
        if not _ID.fullmatch(conversation_id):
            return None
        key, fields, items = _key(tenant, conversation_id), Fields(), dict[str, Fields]()
        for entry in map(_read, await self._shelf.since(key, 0)):
            fields = entry.get("conversation", fields)
            items |= {item["id"]: item for item in entry.get("items", ())}
            items.pop(entry.get("removed", ""), None)
        await self._shelf.renew(key, self._ttl_s)
        return Conversation(fields, list(items.values())) if fields else None

    async def describe(self, tenant: str, fields: Fields) -> bool:
        """Whether it is there."""
        return await self._push(tenant, fields["id"], {"conversation": fields})

    async def add(self, tenant: str, conversation_id: str, items: Sequence[Fields]) -> bool:
        """Items that have ids. Whether it is there."""
        return await self._push(tenant, conversation_id, {"items": list(items)})

    async def remove(self, tenant: str, conversation_id: str, item_id: str) -> bool:
        """Whether it is there."""
        return await self._push(tenant, conversation_id, {"removed": item_id})

    async def delete(self, tenant: str, conversation_id: str) -> bool:
        """Whether there was one."""
        return bool(_ID.fullmatch(conversation_id)) and await self._shelf.delete(_key(tenant, conversation_id))

    async def _push(self, tenant: str, conversation_id: str, entry: Fields) -> bool:
        return await self._shelf.push(_key(tenant, conversation_id), written(entry), self._ttl_s)


def complete(items: Sequence[Fields]) -> list[Fields]:
    """As clients are told of them: with an id, and the end that they have come to."""
    return [{"status": "completed", **item} for item in with_ids(items, uuid.uuid4().hex)]


def _read(entry: bytes) -> Fields:
    fields: Fields = read(entry, 2 * MAX_DEPTH)
    return fields


def _key(tenant: str, conversation_id: str) -> str:
    return f"pw:conversation:{tenant}:{conversation_id}"
