"""Calls of tools in a model's text: what a family of models is to know, and what is found."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Tool:
    """parameters: a JSON schema. strict: calls must follow it even where the model is free to call or not.

    custom: the client takes one text, see custom.py. form: of that text, as structural tags have it; None: any text.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False
    custom: bool = False
    form: dict[str, Any] | None = None


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class Call:
    """The `index`-th call begins."""

    index: int
    id: str
    name: str
    custom: bool = False


@dataclass(frozen=True)
class Arguments:
    """More of the `index`-th call's arguments, which are JSON text once all of it is there."""

    index: int
    text: str


@dataclass(frozen=True)
class Input:
    """More of the text that a custom tool, the `index`-th call's, is given."""

    index: int
    text: str


Piece = Text | Thought | Call | Arguments | Input


class CallParser(Protocol):
    """Of one choice. What all pieces say together does not depend on how the text was cut."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What was held back; the text is over."""
        ...


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def needs_special_tokens(self) -> bool:
        """Whether its marks are tokens that decoding would leave out."""
        ...

    def parser(self, tools: Sequence[Tool]) -> CallParser: ...

    def text_mark(self, tool: Tool) -> str:
        """What a call begins with whose input is all the text that follows."""
        ...

    def forced(self, tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
        """The format (of a structural tag) of an answer that is a call, or several."""
        ...

    def free(self, tools: Sequence[Tool], parallel: bool) -> dict[str, Any] | None:
        """Of an answer in which text and calls may come; None: this family cannot say."""
        ...


class TextOver(Exception):
    """Thrown into a parse when no more characters come."""


Characters = Iterator[Any]


class CharacterParser:
    """A parser that is written as one walk over the characters: `_parse` gets one at each `yield`.

    Being fed one by one, it cannot depend on how the text was cut. It ends with TextOver.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._walk = self._parse()
        next(self._walk)

    def _parse(self) -> Any:
        raise NotImplementedError
        yield

    def push(self, text: str) -> list[Piece]:
        for character in text:
            self._walk.send(character)
        return self._taken()

    def finish(self) -> list[Piece]:
        try:
            self._walk.throw(TextOver())
        except (TextOver, StopIteration):
            pass
        return self._taken()

    def _taken(self) -> list[Piece]:
        taken, self._pieces = joined(self._pieces), []
        return taken

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))

    def _call(self, name: str) -> None:
        self._pieces.append(Call(self._num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self._num_calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(Arguments(self._num_calls - 1, text))


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of a kind as one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + piece.text)
        elif isinstance(piece, Thought) and isinstance(last, Thought):
            result[-1] = Thought(last.text + piece.text)
        elif isinstance(piece, Arguments) and isinstance(last, Arguments) and piece.index == last.index:
            result[-1] = Arguments(piece.index, last.text + piece.text)
        elif isinstance(piece, Input) and isinstance(last, Input) and piece.index == last.index:
            result[-1] = Input(piece.index, last.text + piece.text)
        else:
            result.append(piece)
    return result
