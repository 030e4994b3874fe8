"""Objects of several kinds in a body, told apart by their `type`.

    Annotated[Annotated[A, kind("a")] | Annotated[B, kind("b")], BY_TYPE]

A mistake is then the one kind's own, and its place has no name of a kind in it, as pydantic's have.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Discriminator, Tag

UNKNOWN = "unknown_type"  # as pydantic calls the mistake
_MARK = "<"  # which no field's name begins with


def kind(name: str) -> Tag:
    return Tag(f"{_MARK}{name}")


def without_kinds(place: Iterable[int | str]) -> list[int | str]:
    """The place of a mistake, as the client knows it."""
    return [part for part in place if not (isinstance(part, str) and part.startswith(_MARK))]


def by_type(absent: str | None = None) -> Discriminator:
    """absent: the kind of what has no type."""

    def of(value: object) -> str:
        found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"{_MARK}{absent if found is None else found}"

    return Discriminator(of, UNKNOWN, "its `type` is none of those that it may be")


BY_TYPE = by_type()
