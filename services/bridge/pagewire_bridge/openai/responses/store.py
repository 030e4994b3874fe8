"""Stored responses, each with the items it was asked with and the response before it: conversations.

    pw:response:TENANT:ID          a Record, as JSON
    pw:response:TENANT:ID:lease    there while a bridge runs it in the background
    pw:response:TENANT:ID:events   what it has told so far, if it streams in the background
    pw:response:TENANT:ID:deleted  there where somebody has deleted it while it ran

Who runs it and who cancels it both end it by ending its lease, so that only one of them does. One whose lease is gone
without an end has lost its bridge. One of which nothing is there was lost with all of Redis, and is stored again by who
runs it. For another tenant a response does not exist.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from pagewire_core.errors import InvalidRequest, Unavailable

from pagewire_bridge.json_text import MAX_DEPTH, read, written
from pagewire_bridge.openai.responses.items import Fields
from pagewire_bridge.openai.responses.shelf import Shelf

_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_(?:in)?\d+")  # of items that were named here
_LEASE_S = 15.0
_EVENTS_S = 600.0  # after the end of what tells them
_LOST = {"code": "server_error", "message": "The server that ran this response in the background is gone."}


@dataclass(frozen=True)
class Record:
    """first: id of the conversation's first response. has_events: they can be streamed again."""

    response: Fields
    input: list[Fields]
    first: str
    has_events: bool = False

    @property
    def is_running(self) -> bool:
        return self.response["status"] in ("queued", "in_progress")

    @property
    def items(self) -> list[Fields]:
        """What it adds to its conversation."""
        return [*self.input, *self.response["output"]]


@dataclass(frozen=True)
class Before:
    """The items of a conversation so far, and its name: the first response's. None of either: it begins now."""

    items: list[Fields] = field(default_factory=list)
    first: str = ""


class ResponseStore:
    """ttl_s: how long a response is kept after it ended, and after it, or one that follows it, was used."""

    def __init__(self, shelf: Shelf, ttl_s: float) -> None:
        self._shelf, self._ttl_s = shelf, ttl_s

    async def find(self, tenant: str, response_id: str) -> Record | None:
        """Raises Unavailable."""
        if not _RESPONSE_ID.fullmatch(response_id):
            return None
        key = _key(tenant, response_id)
        record = await self._read(key)
        if record is None or not record.is_running or await self._shelf.get(key + ":lease"):
            return record
        record = await self._read(key)  # it may have ended in between
        if record is not None and record.is_running:
            record.response.update(status="failed", error=_LOST)
        return record

    async def _read(self, key: str) -> Record | None:
        found = await self._shelf.get(key, self._ttl_s)
        return Record(**read(found, 2 * MAX_DEPTH)) if found else None

    async def save(self, tenant: str, record: Record) -> bool:
        """Whether it is stored: an answer is given whether or not it can be."""
        try:
            await self._shelf.put(_key(tenant, record.response["id"]), written(record), self._ttl_s)
        except Unavailable:
            return False
        return True

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was one; it does not go on in the background. Raises Unavailable."""
        if not _RESPONSE_ID.fullmatch(response_id):
            return False
        key = _key(tenant, response_id)
        if await self._shelf.get(key + ":lease"):
            await self._shelf.put(key + ":deleted", b"1", self._ttl_s)  # first: who runs it would take it for lost
        return await self._shelf.delete(key, key + ":lease", key + ":events")

    # ---------------------------------------------------------------- in the background

    async def begin(self, tenant: str, record: Record) -> None:
        """Raises Unavailable."""
        key = _key(tenant, record.response["id"])
        await self._shelf.put(key + ":lease", b"1", _LEASE_S)
        await self._shelf.put(key, written(record), self._ttl_s)

    async def go_on(self, tenant: str, response_id: str) -> bool:
        """Whether it still is to run; to be asked often. Raises Unavailable."""
        key = _key(tenant, response_id)
        await self._shelf.renew(key, self._ttl_s)
        await self._shelf.renew(key + ":events", _EVENTS_S)
        return await self._shelf.renew(key + ":lease", _LEASE_S)

    async def change(self, tenant: str, record: Record) -> bool:
        """What is stored of one that runs, or ends now; whether nobody has ended it before. Raises Unavailable."""
        key, lease_s = _key(tenant, record.response["id"]), _LEASE_S if record.is_running else 0.0
        return await self._shelf.put_under(key + ":lease", lease_s, key, written(record), self._ttl_s)

    async def is_lost(self, tenant: str, response_id: str) -> bool:
        """Whether one that was begun is gone, and nobody has deleted it. Raises Unavailable."""
        key = _key(tenant, response_id)
        return not (await self._shelf.get(key) or await self._shelf.get(key + ":deleted"))

    async def tell(self, tenant: str, response_id: str, first: int, events: Sequence[bytes]) -> None:
        """Of the events from this number on; again, where it is not known that they were told. Raises Unavailable."""
        await self._shelf.append(_key(tenant, response_id) + ":events", first, events, _EVENTS_S)

    async def told(self, tenant: str, response_id: str, first: int) -> list[bytes]:
        """The events from this number on. Raises Unavailable."""
        return await self._shelf.since(_key(tenant, response_id) + ":events", first)

    # ---------------------------------------------------------------- conversations

    async def conversation(self, tenant: str, last_id: str | None) -> Before:
        """That `last_id` ends. Raises InvalidRequest if it, or one before it, is not there any more."""
        records = [record async for record in self._back_from(tenant, last_id)]
        if not records:
            return Before()
        if records[0].is_running:
            raise InvalidRequest("The previous response is still running.", "previous_response_id")
        return Before([item for record in reversed(records) for item in record.items], records[0].first)

    async def _back_from(self, tenant: str, response_id: str | None) -> AsyncIterator[Record]:
        while response_id:
            record = await self.find(tenant, response_id)
            if record is None:
                raise InvalidRequest(f"Previous response with id '{response_id}' not found.", "previous_response_id")
            if record.response.get("conversation"):
                raise InvalidRequest(
                    "The previous response is part of a conversation; go on with `conversation`.",
                    "previous_response_id",
                )
            yield record
            response_id = record.response["previous_response_id"]

    async def resolved(self, tenant: str, items: Sequence[Fields], name: str = "input") -> list[Fields]:
        """The same with the items themselves for references to them. name: of their field. Raises InvalidRequest."""
        return [
            await self._item(tenant, item["id"], f"{name}[{i}].id") if item["type"] == "item_reference" else item
            for i, item in enumerate(items)
        ]

    async def _item(self, tenant: str, item_id: str, where: str) -> Fields:
        named = _ITEM_ID.fullmatch(item_id)
        record = await self.find(tenant, f"resp_{named[1]}") if named else None
        for item in record.items if record else ():
            if item["id"] == item_id:
                return item
        raise InvalidRequest(f"Item with id '{item_id}' not found.", where)


def _key(tenant: str, response_id: str) -> str:
    return f"pw:response:{tenant}:{response_id}"
