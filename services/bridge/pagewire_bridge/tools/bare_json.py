"""The parser of families whose calls are bare JSON: the answer is a call from its first character on, or text."""

from __future__ import annotations

from typing import Any

from pagewire_bridge.tools.calls import TextOver
from pagewire_bridge.tools.json_walk import Broken, Walk, after_space
from pagewire_bridge.tools.walks import MarkedParser

_PYTHON_TAG = "<|python_tag|>"


class BareJsonParser(MarkedParser):
    """Only known tools are called: other JSON objects with a name are answers."""

    def _parse(self) -> Any:
        self._raw: list[str] = []  # since the last call
        try:
            yield from self._recorded(self._raw, self._calls())
        except (Broken, TextOver) as end:
            text = "".join(self._raw)
            if self._begun < self._num_calls:  # in its arguments
                text = ""
            self._say(text if not self._num_calls else text.lstrip())
            if isinstance(end, TextOver):
                raise
        while True:
            self._say((yield))

    _begun = 0  # calls that are complete

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
            yield from self._json_call(self._tools)
            self._begun = self._num_calls
            self._raw.clear()
            between = yield from after_space()
            if listed and between == "]":
                self._raw.clear()
                return
            if between not in ",;":
                raise Broken
            first = yield from after_space()
