"""Parsers of families that announce a call with a mark."""

from __future__ import annotations

from typing import Any

from pagewire_bridge.tools.calls import TextOver
from pagewire_bridge.tools.json_walk import Broken, Walk, after_space, value
from pagewire_bridge.tools.walks import MarkedParser


class OneMark(MarkedParser):
    """Free text, then `mark` and what `_calls` walks over; again. A call that is none is text, its mark included."""

    mark: str

    def _parse(self) -> Any:
        mark = None
        while True:
            raw, num_calls = [mark or (yield from self._text_until([self.mark]))], self._num_calls
            mark = None
            try:
                mark = yield from self._recorded(raw, self._calls())
            except Broken:
                pass
            finally:
                if self._num_calls == num_calls:
                    self._say("".join(raw))

    def _calls(self) -> Walk:
        """Returns the mark where it has read the next one, too."""
        raise NotImplementedError
        yield

    def _to_end(self, end: str, read: str = "") -> Walk:
        """As `_until` the end of a call; where the model has left that out, all that follows is text, or the next call,
        whose mark is returned.
        """
        between: list[str] = []
        try:
            found = yield from self._first_of([end, self.mark], between.append, read if end.startswith(read) else "")
        except TextOver:
            self._say("".join(between).lstrip())
            raise
        if found == end:
            return None
        self._say("".join(between).strip())
        return found


class HermesParser(OneMark):
    mark = "<tool_call>"

    def _calls(self) -> Walk:
        if (yield from after_space()) != "{":
            raise Broken
        after = yield from self._json_call()
        return (yield from self._to_end("</tool_call>", after))


class MistralParser(OneMark):
    mark = "[TOOL_CALLS]"

    def _calls(self) -> Walk:
        first = yield from after_space()
        if first == "[":
            yield from self._list()
            return
        if first == "{":
            yield from self._json_call()
            return
        text = [first]
        yield from self._until("{", text.append)
        name = "".join(text).partition("[")[0].strip()  # [CALL_ID]... and [ARGS] may stand between
        if not name:
            raise Broken
        self._call(name)
        yield from value("{", self._argue)

    def _list(self) -> Walk:
        character = ","
        while character == ",":
            if (yield from after_space()) != "{":
                raise Broken
            character = (yield from self._json_call()) or (yield from after_space())


class DeepSeekParser(OneMark):
    """V3 names the function in a line of its own, V3.1 before the separator."""

    mark = "<｜tool▁calls▁begin｜>"

    def _calls(self) -> Walk:
        while (yield from self._first_of(["<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"])) == "<｜tool▁call▁begin｜>":
            name: list[str] = []
            yield from self._until("<｜tool▁sep｜>", name.append)
            first = yield from after_space()
            if first != "{":
                name = [first]
                yield from self._until("\n", name.append)
                yield from self._until("{")
            self._call("".join(name).strip())
            after = ""
            try:
                yield from value("{", self._argue)
            except Broken as error:
                after = error.character
            yield from self._until("<｜tool▁call▁end｜>", read=after)
