"""Thoughts and answers apart, for the families of models by the names of vLLM's --reasoning-parser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagewire_bridge.tools.calls import CharacterParser, Piece, Text, TextOver, Thought
from pagewire_bridge.tools.walks import completes


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around thoughts. always: an output that does not begin with `begin` begins with thoughts, too."""

    begin: str
    end: str
    always: bool = False

    def parser(self, prompt_tail: str) -> ReasoningParser:
        """prompt_tail: the prompt may have begun the thoughts, or ended them."""
        tail = prompt_tail.rstrip()
        if tail.endswith(self.end):
            return ReasoningParser(self, thinking=False)
        return ReasoningParser(self, thinking=True if tail.endswith(self.begin) else None)


class ReasoningParser(CharacterParser):
    """Gives Thought and Text, without the marks and the white space next to them.

    thinking: None: the output's beginning says it.
    """

    def __init__(self, form: ReasoningFormat, thinking: bool | None) -> None:
        self._form, self._told = form, thinking
        self.thinking = thinking is True  # now
        self.answering = False
        super().__init__()

    def push(self, text: str) -> list[Piece]:
        return [Text(text)] * bool(text) if self.answering else super().push(text)

    def _parse(self) -> Any:
        read = ""
        if self._told is None:
            read = yield from self._begin()
        if self.thinking:
            yield from self._think(read)
        else:
            self._say(read)
        self.answering = True
        while True:
            self._say((yield))

    def _begin(self) -> Any:
        """Whether thoughts come first. Returns what was read of them, or of the answer."""
        read, begin, always = "", self._form.begin, self._form.always
        try:
            while begin.startswith(read.lstrip()):
                if read.lstrip() == begin:
                    self.thinking = True
                    return ""
                read += yield
        except TextOver:
            if always and read.strip():
                self._pieces.append(Thought(read.strip()))
            else:
                self._say(read)
            raise
        self.thinking = always
        return read

    def _think(self, read: str) -> Any:
        held, space, begun = "", "", False
        characters = iter(read)
        try:
            while True:
                character = next(characters, None)
                text, held, mark = completes(held, (yield) if character is None else character, [self._form.end])
                text = space + text if begun else text.lstrip()
                kept = text.rstrip()
                space = text[len(kept) :]
                if kept:
                    begun = True
                    self._pieces.append(Thought(kept))
                if mark is not None:
                    break
        except TextOver:
            if held:
                self._pieces.append(Thought(space + held if begun else held))
            raise
        self.thinking = False
        after: str = yield
        while after.isspace():
            after = yield
        self._say(after)


_THINK = ReasoningFormat("<think>", "</think>")
_R1 = ReasoningFormat("<think>", "</think>", always=True)

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": _R1,
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "qwen3": _THINK,
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
}
