"""Tools that are given one text: OpenAI's `custom` tools.

Models know functions alone, so they are told of a function whose only argument is the text. What they write is read as
that text: the argument of such a call, or all that follows the family's mark, where a grammar has written that.
"""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from pagewire_bridge.json_text import written
from pagewire_bridge.tools.calls import Arguments, Call, CallParser, Input, Piece, Text, TextOver, Tool, ToolFormat
from pagewire_bridge.tools.json_walk import Broken, Walk, after_space, members, value
from pagewire_bridge.tools.walks import MarkedParser, completes

_INPUT = "input"
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def parameters(told: str) -> dict[str, Any]:
    """Of the function that a model sees. told: what there is to know of the text."""
    text = {"type": "string", "description": told}
    return {"type": "object", "properties": {_INPUT: text}, "required": [_INPUT], "additionalProperties": False}


def arguments(text: str) -> str:
    """Of the call of that function."""
    return written({_INPUT: text}).decode()


def custom_calls(parser: CallParser, tools: Sequence[Tool], form: ToolFormat) -> CallParser:
    """As `parser`, but calls of custom tools have their input instead of arguments."""
    return CustomCalls(parser, tools, form) if any(tool.custom for tool in tools) else parser


class CustomCalls:
    """A CallParser around that of a family."""

    def __init__(self, parser: CallParser, tools: Sequence[Tool], form: ToolFormat) -> None:
        self._parser, self._custom = parser, {tool.name for tool in tools if tool.custom}
        self._marks = {form.text_mark(tool): tool.name for tool in tools if tool.form}
        self._held = ""  # what may be a part of a mark
        self._num_calls = 0
        self._input: InputParser | None = None  # of the call that is being read
        self._in_text = False

    def push(self, text: str) -> list[Piece]:
        if self._in_text:
            return self._more(text)
        if not self._marks:
            return self._with_inputs(self._parser.push(text))
        pieces: list[Piece] = []
        for i, character in enumerate(text):
            free, self._held, mark = completes(self._held, character, [*self._marks])
            if free:
                pieces += self._with_inputs(self._parser.push(free))
            if mark is not None:
                return [*pieces, *self._call(self._marks[mark]), *self._more(text[i + 1 :])]
        return pieces

    def finish(self) -> list[Piece]:
        if self._in_text:
            return []
        pieces = self._with_inputs([*self._parser.push(self._held), *self._parser.finish()])
        return [*pieces, *self._end_input()]

    def _call(self, name: str) -> list[Piece]:
        """All that follows is the input of this one. White space before a call is not said."""
        self._in_text = True
        before = [*self._with_inputs(self._parser.finish()), *self._end_input()]
        if before and isinstance(before[-1], Text):
            before[-1] = Text(before[-1].text.rstrip())
        call = Call(self._num_calls, f"call_{uuid.uuid4().hex[:24]}", name, custom=True)
        return [*(piece for piece in before if not isinstance(piece, Text) or piece.text), call]

    def _more(self, text: str) -> list[Piece]:
        return [Input(self._num_calls, text)] if text else []

    def _with_inputs(self, pieces: Iterable[Piece]) -> list[Piece]:
        result: list[Piece] = []
        for piece in pieces:
            if self._input and isinstance(piece, Arguments):
                result += self._input.push(piece.text)
                continue
            result += self._end_input()
            if isinstance(piece, Call):
                self._num_calls = piece.index + 1
                if piece.name in self._custom:
                    self._input = InputParser(piece.index)
                    piece = Call(piece.index, piece.id, piece.name, custom=True)
            result.append(piece)
        return result

    def _end_input(self) -> list[Piece]:
        pieces = self._input.finish() if self._input else []
        self._input = None
        return pieces


class InputParser(MarkedParser):
    """Of a call's arguments: the text in them as it comes. What is no object with a text is the input as it stands."""

    def __init__(self, index: int) -> None:
        self._index, self._begun = index, False
        # Which puts surrogates together that come one by one, and has a substitute for those that come alone.
        self._units = codecs.getincrementaldecoder("utf-16-le")("replace")
        super().__init__(())

    def _parse(self) -> Any:
        raw: list[str] = []
        try:
            try:
                yield from self._recorded(raw, self._object())
            except Broken:
                pass
            while True:
                raw.append((yield))
        except TextOver:
            if not self._begun:
                self._give("".join(raw))
            raise

    def _object(self) -> Walk:
        if (yield from after_space()) != "{":
            raise Broken
        yield from members(self._member)

    def _member(self, key: str, first: str) -> Walk:
        if key != _INPUT or first != '"' or self._begun:
            return (yield from value(first, lambda text: None))
        self._begun = True
        while (character := (yield)) != '"':
            self._give((yield from self._escaped()) if character == "\\" else character)
        return None

    def _escaped(self) -> Walk:
        kind = yield
        if kind != "u":
            return _ESCAPES.get(kind, kind)
        digits = ""
        while len(digits) < 4:
            digits += yield
        try:
            return chr(int(digits, 16))
        except ValueError:
            raise Broken from None

    def _give(self, text: str) -> None:
        text = self._units.decode(text.encode("utf-16-le", "surrogatepass"))
        if text:
            self._pieces.append(Input(self._index, text))
