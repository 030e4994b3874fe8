"""Walks over JSON text, character by character: parts of a CharacterParser's walk (`yield` gives the next character).

Where only the character after it says that a value is over (a number's, say), it is returned; else None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

Walk = Generator[None, str, Any]
_SPACE = " \t\r\n"


class Broken(Exception):
    """The text is no JSON, or not the JSON that was expected.

    character: the one that could not be read, if it was one: it may begin what follows the JSON.
    """

    def __init__(self, character: str = "") -> None:
        self.character = character


def after_space() -> Walk:
    """The next character that is none."""
    while (character := (yield)) in _SPACE:
        pass
    return character


def value(first: str, take: Callable[[str], object]) -> Walk:
    """One value that begins with `first`; its text goes to `take` as it comes.

    Raises Broken where it is not complete before a mark, which begins with `<`, as JSON does nowhere but in a string.
    """
    take(first)
    if first == '"':
        yield from _string(take)
        return None
    if first not in "{[":
        while (character := (yield)) not in ",}]<" and character not in _SPACE:
            take(character)
        return character
    depth = 1
    while depth:
        character = yield
        if character == "<":
            raise Broken(character)
        take(character)
        if character == '"':
            yield from _string(take)
        depth += (character in "{[") - (character in "}]")
    return None


def string() -> Walk:
    """The text of a string whose quote was taken. Raises Broken."""
    text: list[str] = ['"']
    yield from _string(text.append)
    return decoded("".join(text))


def decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Broken from None


def _string(take: Callable[[str], object]) -> Walk:
    escaped = False
    while True:
        take(character := (yield))
        if character == '"' and not escaped:
            return
        escaped = character == "\\" and not escaped


def members(take: Callable[[str, str], Walk]) -> Walk:
    """The members of an object whose brace was taken. take(key, first): walks over a value. Raises Broken."""
    character = yield from after_space()
    while character != "}":
        if character != '"':
            raise Broken(character)
        key = yield from string()
        if (character := (yield from after_space())) != ":":
            raise Broken(character)
        character = yield from take(key, (yield from after_space()))
        if character is None or character in _SPACE:
            character = yield from after_space()
        if character == ",":
            character = yield from after_space()
        elif character != "}":
            raise Broken(character)
