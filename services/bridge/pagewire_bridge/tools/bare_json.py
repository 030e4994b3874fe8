"""The parser of families whose calls are bare JSON: the answer is a call from its first character on, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagewire_bridge.tools.calls import Piece, Text, TextOver, Tool
from pagewire_bridge.tools.json_walk import Broken, Walk, after_space
from pagewire_bridge.tools.walks import MarkedParser

_PYTHON_TAG = "<|python_tag|>"


class BareJsonParser(MarkedParser):
    """Only known tools are called: other JSON objects with a name are answers."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._raw: list[str] = []  # since the last call
        self._num_complete = 0  # calls
        self._answering = False
        super().__init__(tools)

    def push(self, text: str) -> list[Piece]:
        return [Text(text)] * bool(text) if self._answering else super().push(text)

    def _parse(self) -> Any:
        try:
            yield from self._recorded(self._raw, self._calls())
        except (Broken, TextOver) as end:
            if self._num_complete == self._num_calls:  # else it is in a call's arguments, which were said
                text = "".join(self._raw)
                self._say(text.lstrip() if self._num_calls else text)
            if isinstance(end, TextOver):
                raise
        self._answering = True
        while True:
            self._say((yield))

    def _calls(self) -> Walk:
        first = yield from after_space()
        if first == "<":
            for expected in _PYTHON_TAG[1:]:
                if (yield) != expected:
                    raise Broken
            first = yield from after_space()
        listed = first == "["
        if listed:
            first = yield from after_space()
        while True:
            if first != "{":
                raise Broken
            after = yield from self._json_call(self._tools)
            self._num_complete = self._num_calls
            self._raw[:] = after
            between = after or (yield from after_space())
            if listed and between == "]":
                self._raw.clear()
                return
            if between not in ",;":
                raise Broken
            first = yield from after_space()
