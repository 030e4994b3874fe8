"""Lists that are told in pages."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire_core.errors import InvalidRequest

from pagewire_bridge.openai.responses.items import Fields

DEFAULT_PAGE, MAX_PAGE = 20, 100


def page_of(items: list[Fields], asked: Mapping[str, str]) -> Fields:
    """asked: a query. The newest first unless `order` says otherwise. Raises InvalidRequest."""
    limit, order, after = asked.get("limit", str(DEFAULT_PAGE)), asked.get("order", "desc"), asked.get("after")
    if not (limit.isdecimal() and len(limit) < 10 and 1 <= int(limit) <= MAX_PAGE):
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {MAX_PAGE}.", "limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be asc or desc.", "order")
    ordered = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise InvalidRequest(f"Item with id '{after}' not found.", "after")
    begin_at = 0 if after is None else ids.index(after) + 1
    page = ordered[begin_at : begin_at + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin_at + len(page) < len(ordered),
    }
