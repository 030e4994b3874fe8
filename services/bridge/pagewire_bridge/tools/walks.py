"""What the families' parsers share: free text before a mark, and one call as a JSON object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from pagewire_bridge.tools.calls import CharacterParser, Piece, TextOver, Tool
from pagewire_bridge.tools.json_walk import Broken, Walk, decoded, members, value

ARGUMENTS = ("arguments", "parameters")
_BEFORE_NAME = (*ARGUMENTS, "name", "type", "id")


def completes(held: str, character: str, marks: Sequence[str]) -> tuple[str, str, str | None]:
    """(text that can be no part of a mark, text that may be, the mark that is complete) after one more character."""
    held += character
    for begin in range(len(held)):
        rest = held[begin:]
        if rest in marks:
            return held[:begin], "", rest
        if any(mark.startswith(rest) for mark in marks):
            return held[:begin], rest, None
    return held, "", None


class MarkedParser(CharacterParser):
    """Of text in which marks announce calls. White space next to calls is not said."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._marks: Sequence[str] = ()  # that may come while the text is free
        self._held = self._space = ""  # what may be a part of a mark; white space before it
        self._skipping = False  # white space after a call
        super().__init__()

    def push(self, text: str) -> list[Piece]:
        """Text that cannot begin a mark needs no walk: 2 microseconds instead of 10 for a token."""
        if not self._marks or self._held or any(mark[0] in text for mark in self._marks):
            return super().push(text)
        self._free(text)
        return self._taken()

    def _text_until(self, marks: Sequence[str]) -> Walk:
        """Says the text up to one of the marks, and returns the mark, with the white space before it."""
        self._marks, self._held, self._space, self._skipping = marks, "", "", self._num_calls > 0
        try:
            mark = None
            while mark is None:
                text, self._held, mark = completes(self._held, (yield), marks)
                self._free(text)
        except TextOver:
            rest = self._space + self._held
            self._say(rest.lstrip() if self._skipping else rest)
            raise
        self._marks = ()
        return self._space + mark

    def _free(self, text: str) -> None:
        if self._skipping:
            text = text.lstrip()
            self._skipping = not text
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._say(kept)

    def _until(self, mark: str, take: Callable[[str], object] = lambda text: None, read: str = "") -> Walk:
        """Takes the text up to a mark. read: the character before, which may begin it."""
        yield from self._first_of([mark], take, read if mark.startswith(read) else "")

    def _first_of(
        self, marks: Sequence[str], take: Callable[[str], object] = lambda text: None, held: str = ""
    ) -> Walk:
        """Takes the text up to one of the marks, and returns which it was. held: what may have begun it."""
        found = None
        while found is None:
            text, held, found = completes(held, (yield), marks)
            if text:
                take(text)
        return found

    def _text_to(self, marks: Sequence[str]) -> Walk:
        """The text up to one of the marks, and which it was."""
        text: list[str] = []
        mark = yield from self._first_of(marks, text.append)
        return "".join(text), mark

    def _text_before(self, mark: str) -> Walk:
        text, _ = yield from self._text_to([mark])
        return text

    def _recorded(self, raw: list[str], walk: Walk) -> Walk:
        """As `walk`, with all characters that it gets in `raw`."""
        next(walk)
        while True:
            try:
                raw.append((yield))
            except TextOver as over:
                walk.throw(over)
            try:
                walk.send(raw[-1])
            except StopIteration as stop:
                return stop.value

    def _json_call(self, known: Collection[str] | None = None) -> Walk:
        """{"name": ..., "arguments": ...} whose brace was taken. Raises Broken before anything of it was said.

        Returns the character that broke it when it was said, none if it is whole: models forget the last brace.

        known: names that may be called; None: any. Arguments that are a string are the text in it, null is none.
        """
        num_calls, early, argued = self._num_calls, list[str](), False

        def take(key: str, first: str) -> Walk:
            nonlocal argued
            begun = self._num_calls > num_calls
            if not begun and key not in _BEFORE_NAME:
                raise Broken
            if key == "name" and not begun:
                after = yield from self._name(first, known)
                self._argue("".join(early))
            elif key in ARGUMENTS and not argued:
                argued = True
                after = yield from self._arguments(first, self._argue if begun else early.append)
            else:
                after = yield from value(first, lambda text: None)
            return after

        after = ""
        try:
            yield from members(take)
        except Broken as error:
            after = error.character
        if self._num_calls == num_calls:
            raise Broken
        if not argued:
            self._argue("{}")
        return after

    def _name(self, first: str, known: Collection[str] | None) -> Walk:
        parts: list[str] = []
        after = yield from value(first, parts.append)
        name = decoded("".join(parts))
        if not isinstance(name, str) or not (known is None or name in known):
            raise Broken
        self._call(name)
        return after

    def _arguments(self, first: str, take: Callable[[str], Any]) -> Walk:
        if first not in '"n':
            return (yield from value(first, take))
        parts: list[str] = []
        after = yield from value(first, parts.append)
        text = "".join(parts)
        take(decoded(text) if first == '"' else "{}" if text == "null" else text)
        return after
