"""Deltas of the router as an Anthropic message: whole, or as events.

    message_start, (content_block_start, content_block_delta ..., content_block_stop) ..., message_delta, message_stop

A block is a thought, a text or a call of a tool. A `ping` may stand between any two events, while nothing else comes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, Summary
from pagewire_core.errors import PagewireError

from pagewire_bridge import sse
from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.anthropic.errors import from_error
from pagewire_bridge.generation import Generation
from pagewire_bridge.json_text import exact_object
from pagewire_bridge.tools.calls import Arguments, Call, Piece, Text, Thought, joined

log = structlog.get_logger(__name__)

Fields = dict[str, Any]
PING = sse.event({"type": "ping"}, "ping")


@dataclass
class Answer:
    """head: id, type, role, model. parser: where the text is more than text. is_clipped: an answer of full length ends
    because the context does.
    """

    head: Fields
    parser: AnswerParser | None = None
    with_thoughts: bool = False
    is_clipped: bool = False
    stop_reason: str | None = None
    stop_sequence: str | None = None

    def take(self, delta: Delta) -> list[Piece]:
        """What a delta says."""
        pieces: list[Piece] = [Text(delta.text)] if delta.text else []
        if self.parser:
            pieces = self.parser.push(delta.text)
            if delta.finish_reason:
                pieces = joined([*pieces, *self.parser.finish()])
        if delta.HasField("stop_string"):
            self.stop_reason, self.stop_sequence = "stop_sequence", delta.stop_string
        elif delta.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            self.stop_reason = "model_context_window_exceeded" if self.is_clipped else "max_tokens"
        elif delta.finish_reason == common_pb2.FINISH_REASON_STOP:
            self.stop_reason = "tool_use" if self.parser and self.parser.num_calls else "end_turn"
        return [piece for piece in pieces if self.with_thoughts or not isinstance(piece, Thought)]

    @property
    def ending(self) -> Fields:
        return {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}


def usage(summary: Summary) -> dict[str, int]:
    """input_tokens leaves out what came from the cache, as Anthropic counts: the input is the sum of three."""
    return {
        "input_tokens": summary.prompt_tokens - summary.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": summary.cached_tokens,
        "output_tokens": summary.completion_tokens,
    }


async def whole(answer: Answer, generation: Generation) -> Fields:
    """Raises PagewireError."""
    pieces: list[Piece] = []
    async for _, delta in generation.deltas():
        pieces += answer.take(delta)
    content: list[Fields] = []
    for piece in joined(pieces):
        if isinstance(piece, Arguments):
            content[-1]["input"] = exact_object(piece.text)
        else:
            content.append(_filled(piece))
    return {**answer.head, "content": content, **answer.ending, "usage": usage(generation.summaries[0])}


async def events(answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """After a failure one error event, and no more."""
    # What will come from the cache is not known yet.
    before = Summary(prompt_tokens=generation.accepted[0].prompt_tokens)
    begin = {**answer.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage(before)}
    yield _event({"type": "message_start", "message": begin})
    blocks = _Blocks()
    try:
        async for _, delta in generation.deltas():
            for piece in answer.take(delta):
                for event in blocks.of(piece):
                    yield _event(event)
        for event in blocks.end():
            yield _event(event)
        yield _event({"type": "message_delta", "delta": answer.ending, "usage": usage(generation.summaries[0])})
        yield _event({"type": "message_stop"})
    except PagewireError as error:
        log.warning("stream failed", error=error.message)
        yield _event(from_error(error))


class _Blocks:
    """The events of an answer's blocks, of which one is open at a time.

    A call's arguments are told if they are an object, as its input is one: else it is the empty one of its begin.
    """

    def __init__(self) -> None:
        self._index = -1
        self._open: type[Piece] | None = None
        self._is_object: bool | None = None  # of the call that is open; None: they have not begun

    def of(self, piece: Piece) -> Iterator[Fields]:
        kind = Call if isinstance(piece, Arguments) else type(piece)
        if kind is not self._open or isinstance(piece, Call):
            yield from self.end()
            self._open, self._is_object = kind, None
            self._index += 1
            yield {"type": "content_block_start", "index": self._index, "content_block": _empty(piece)}
        if isinstance(piece, Arguments):
            if self._is_object is None and piece.text.strip():
                self._is_object = piece.text.lstrip().startswith("{")
            if not self._is_object:
                return
        if delta := _delta(piece):
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}

    def end(self) -> Iterator[Fields]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None


def _empty(piece: Piece) -> Fields:
    match piece:
        case Text():
            return {"type": "text", "text": ""}
        case Thought():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case Call(_, call_id, name):
            return {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    raise AssertionError(piece)  # arguments follow their call


def _filled(piece: Piece) -> Fields:
    match piece:
        case Text(text):
            return {"type": "text", "text": text}
        case Thought(text):
            return {"type": "thinking", "thinking": text, "signature": ""}
    return _empty(piece)


def _delta(piece: Piece) -> Fields | None:
    match piece:
        case Text(text):
            return {"type": "text_delta", "text": text}
        case Thought(text):
            return {"type": "thinking_delta", "thinking": text}
        case Arguments(_, text):
            return {"type": "input_json_delta", "partial_json": text}
    return None


def _event(data: Fields) -> bytes:
    return sse.event(data, data["type"])
