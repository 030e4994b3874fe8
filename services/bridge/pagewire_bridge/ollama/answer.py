"""Deltas of the router as Ollama's lines: one for every delta, and a last one with the account.

A call of a tool is told as a whole, with an object as its arguments.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, TokenText
from pagewire_core.errors import PagewireError

from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.generation import Generation
from pagewire_bridge.json_line import json_line
from pagewire_bridge.json_text import exact_object
from pagewire_bridge.ollama.errors import error_object
from pagewire_bridge.timestamps import rfc3339
from pagewire_bridge.tools.calls import Arguments, Call, Piece, Text, Thought, joined

log = structlog.get_logger(__name__)


@dataclass
class Answer:
    """What one answer is made with. truncated: tokens that its prompt was too long."""

    model: str
    is_chat: bool
    with_context: bool = False
    logprobs: bool = False
    truncated: int = 0
    parser: AnswerParser | None = None
    with_thoughts: bool = False
    began: float = field(default_factory=time.perf_counter)
    _ids: list[int] = field(default_factory=list)
    _held: list[Piece] = field(default_factory=list)
    _done_reason: str = "stop"

    def head(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": rfc3339(time.time())}

    def content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What some pieces say: text, thoughts and calls."""
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        more = {"thinking": thoughts} if thoughts else {}
        if not self.is_chat:
            return {"response": text, **more}
        calls = _calls(pieces)
        return {"message": {"role": "assistant", "content": text, **more, **({"tool_calls": calls} if calls else {})}}

    def take(self, delta: Delta) -> list[Piece]:
        """What a delta says. Calls are held back until all of them are complete."""
        if self.with_context:
            self._ids.extend(token.token_id for token in delta.tokens)
        if delta.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            self._done_reason = "length"
        pieces: list[Piece] = [Text(delta.text)] if delta.text else []
        if self.parser:
            pieces = self.parser.push(delta.text)
            if delta.finish_reason:
                pieces += self.parser.finish()
        self._held += [piece for piece in pieces if isinstance(piece, Call | Arguments)]
        said: list[Piece] = [
            p for p in pieces if isinstance(p, Text) or (isinstance(p, Thought) and self.with_thoughts)
        ]
        return [*said, *self._held] if delta.finish_reason else said

    def ending(self, generation: Generation) -> dict[str, Any]:
        """The keys of the last line; durations in nanoseconds."""
        summary, accepted = generation.summaries[0], generation.accepted[0]
        total_ns = int((time.perf_counter() - self.began) * 1e9)
        first_ns = summary.time_to_first_token_us * 1000
        ending: dict[str, Any] = {
            "done": True,
            "done_reason": self._done_reason,
            "total_duration": total_ns,
            # What happened before the router began: the model is always loaded.
            "load_duration": max(total_ns - summary.total_us * 1000, 1),
            "prompt_eval_count": summary.prompt_tokens,
            "prompt_eval_duration": max(first_ns - summary.timings.queue_us * 1000, 1),
            "eval_count": summary.completion_tokens,
            "eval_duration": max(summary.total_us * 1000 - first_ns, 1),
        }
        if self.with_context:
            ending["context"] = [*accepted.prompt_token_ids, *self._ids]
        if self.truncated:
            ending["prompt_truncated"] = self.truncated
        return ending


def logprobs(delta: Delta) -> dict[str, Any]:
    return {"logprobs": [{**_logprob(t), "top_logprobs": [_logprob(top) for top in t.top]} for t in delta.tokens]}


def _logprob(token: TokenText) -> dict[str, Any]:
    text = token.bytes.decode("utf-8", "replace")
    return {"token": text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _calls(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    arguments = {piece.index: piece.text for piece in joined(pieces) if isinstance(piece, Arguments)}
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    return [
        {
            "id": c.id,
            "function": {"index": c.index, "name": c.name, "arguments": exact_object(arguments.get(c.index, "{}"))},
        }
        for c in calls
    ]


async def whole(answer: Answer, generation: Generation) -> dict[str, Any]:
    """Raises PagewireError."""
    pieces: list[Piece] = []
    tokens: list[dict[str, Any]] = []
    async for _, delta in generation.deltas():
        pieces += answer.take(delta)
        tokens += logprobs(delta)["logprobs"] if answer.logprobs else []
    shown = {"logprobs": tokens} if answer.logprobs else {}
    return {**answer.head(), **answer.content(pieces), **shown, **answer.ending(generation)}


async def lines(answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """Lines of JSON; after a failure one that says so, and no more."""
    try:
        async for _, delta in generation.deltas():
            pieces = answer.take(delta)
            if pieces or (answer.logprobs and delta.tokens):
                shown = logprobs(delta) if answer.logprobs else {}
                yield line({**answer.head(), **answer.content(pieces), **shown, "done": False})
        yield line({**answer.head(), **answer.content(()), **answer.ending(generation)})
    except PagewireError as error:
        log.warning("stream failed", error=error.message)
        yield line(error_object(error))


def line(content: dict[str, Any]) -> bytes:
    return json_line(content) + b"\n"
