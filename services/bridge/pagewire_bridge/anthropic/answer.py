"""Deltas of the router as an Anthropic message: whole, or as events.

message_start, (content_block_start, content_block_delta ..., content_block_stop), message_delta, message_stop
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, Summary
from pagewire_core.errors import PagewireError

from pagewire_bridge import sse
from pagewire_bridge.anthropic.errors import from_error
from pagewire_bridge.generation import Generation

log = structlog.get_logger(__name__)


@dataclass
class Answer:
    """head: id, type, role, model."""

    head: dict[str, Any]
    stop_reason: str | None = None
    stop_sequence: str | None = None

    def take(self, delta: Delta) -> None:
        if delta.HasField("stop_string"):
            self.stop_reason, self.stop_sequence = "stop_sequence", delta.stop_string
        elif delta.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            self.stop_reason = "max_tokens"
        elif delta.finish_reason == common_pb2.FINISH_REASON_STOP:
            self.stop_reason = "end_turn"

    @property
    def ending(self) -> dict[str, Any]:
        return {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}


def usage(summary: Summary) -> dict[str, int]:
    """input_tokens leaves out what came from the cache, as Anthropic counts."""
    return {
        "input_tokens": summary.prompt_tokens - summary.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": summary.cached_tokens,
        "output_tokens": summary.completion_tokens,
    }


async def whole(answer: Answer, generation: Generation) -> dict[str, Any]:
    """Raises PagewireError."""
    text: list[str] = []
    async for _, delta in generation.deltas():
        answer.take(delta)
        text.append(delta.text)
    content = [{"type": "text", "text": "".join(text)}] if any(text) else []
    return {**answer.head, "content": content, **answer.ending, "usage": usage(generation.summaries[0])}


async def events(answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """After a failure one error event, and no more."""
    before = {"input_tokens": generation.accepted[0].prompt_tokens, "output_tokens": 0}
    begin = {**answer.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": before}
    yield _event({"type": "message_start", "message": begin})
    try:
        is_open = False
        async for _, delta in generation.deltas():
            answer.take(delta)
            if not delta.text:
                continue
            if not is_open:
                is_open = True
                yield _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
            text = {"type": "text_delta", "text": delta.text}
            yield _event({"type": "content_block_delta", "index": 0, "delta": text})
        if is_open:
            yield _event({"type": "content_block_stop", "index": 0})
        yield _event({"type": "message_delta", "delta": answer.ending, "usage": usage(generation.summaries[0])})
        yield _event({"type": "message_stop"})
    except PagewireError as error:
        log.warning("stream failed", error=error.message)
        yield _event(from_error(error))


def _event(data: dict[str, Any]) -> bytes:
    return sse.event(data, data["type"])
