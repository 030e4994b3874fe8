"""The text of one choice as thoughts, content and calls of tools, for every API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pagewire.v1.inference_pb2 import TokenText

from pagewire_bridge.reasoning import ReasoningFormat
from pagewire_bridge.tools.calls import Arguments, Call, CallParser, Input, Piece, Text, ToolFormat, joined
from pagewire_bridge.tools.families import TOOL_FORMATS


@dataclass(frozen=True)
class AnswerFormat:
    """How the served model writes calls and thoughts (--tool-call-parser, --reasoning-parser); None: not at all.

    auto_tools: whether it may be left to the model to call.
    """

    tools: ToolFormat | None = None
    auto_tools: bool = False
    reasoning: ReasoningFormat | None = None

    @property
    def forced_tools(self) -> ToolFormat:
        """For calls that the grammar writes: any form will do."""
        return self.tools or TOOL_FORMATS["json"]

    @property
    def with_tools(self) -> AnswerFormat:
        """For an API in which tools need no leave of the server."""
        return replace(self, tools=self.forced_tools, auto_tools=True)


NO_FORMAT = AnswerFormat()


class AnswerParser:
    """Of one choice. All pieces together are the same however the text was cut.

    parallel: whether there may be several calls; of a model that makes more all the same, the first is taken.
    """

    def __init__(
        self, tools: CallParser | None, reasoning: ReasoningFormat | None, prompt_tail: str, parallel: bool = True
    ) -> None:
        self._tools, self._parallel = tools, parallel
        self._reasoning = reasoning.parser(prompt_tail) if reasoning else None
        self._counted = _in_bytes(reasoning).parser(prompt_tail) if reasoning else None
        self._undecided: list[TokenText] = []
        self.num_thought = 0  # tokens
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        return self._noted(self._called(self._reasoning.push(text) if self._reasoning else [Text(text)]))

    def finish(self) -> list[Piece]:
        """The text is over."""
        pieces = self._called(self._reasoning.finish() if self._reasoning else [])
        return self._noted(joined([*pieces, *(self._tools.finish() if self._tools else [])]))

    def count(self, tokens: Sequence[TokenText]) -> Sequence[TokenText]:
        """Counts the tokens of the thoughts, by their bytes: text and tokens do not always come together.

        Returns those of the answer after them.
        """
        if self._counted is None or self._counted.answering:
            return tokens
        after: list[TokenText] = []
        for token in tokens:
            pieces = self._counted.push(token.bytes.decode("latin-1"))
            self.num_thought += self._counted.thinking
            self._undecided.append(token)
            if self._counted.thinking:
                self._undecided.clear()
            after += self._last_undecided(sum(len(piece.text) for piece in pieces if isinstance(piece, Text)))
        return after

    def _last_undecided(self, num_bytes: int) -> list[TokenText]:
        """The tokens that a text came in; what begins like a mark is said late."""
        taken: list[TokenText] = []
        while num_bytes > 0 and self._undecided:
            taken.insert(0, self._undecided.pop())
            num_bytes -= len(taken[0].bytes)
        return taken

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        if not self._parallel:
            pieces = [piece for piece in pieces if not isinstance(piece, Call | Arguments | Input) or piece.index == 0]
        self.num_calls += sum(isinstance(piece, Call) for piece in pieces)
        return pieces

    def _called(self, pieces: Iterable[Piece]) -> list[Piece]:
        if self._tools is None:
            return [piece for piece in pieces if not isinstance(piece, Text) or piece.text]
        result: list[Piece] = []
        for piece in pieces:
            result += self._tools.push(piece.text) if isinstance(piece, Text) else [piece]
        return result


def _in_bytes(reasoning: ReasoningFormat) -> ReasoningFormat:
    begin, end = (mark.encode().decode("latin-1") for mark in (reasoning.begin, reasoning.end))
    return ReasoningFormat(begin, end, reasoning.always)
