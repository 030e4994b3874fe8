"""Deltas of the router as Ollama's lines: one for every delta, and a last one with the account."""

from __future__ import annotations

import datetime
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, TokenText
from pagewire_core.errors import PagewireError

from pagewire_bridge.generation import Generation
from pagewire_bridge.ollama.errors import error_object

log = structlog.get_logger(__name__)


@dataclass
class Answer:
    """What one answer is made with. truncated: tokens that its prompt was too long."""

    model: str
    is_chat: bool
    with_context: bool = False
    logprobs: bool = False
    truncated: int = 0
    began: float = field(default_factory=time.perf_counter)
    _ids: list[int] = field(default_factory=list)
    _done_reason: str = "stop"

    def head(self) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC)
        return {"model": self.model, "created_at": now.isoformat().replace("+00:00", "Z")}

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.is_chat else {"response": text}

    def take(self, delta: Delta) -> None:
        if self.with_context:
            self._ids.extend(token.token_id for token in delta.tokens)
        if delta.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            self._done_reason = "length"

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


async def whole(answer: Answer, generation: Generation) -> dict[str, Any]:
    """Raises PagewireError."""
    text: list[str] = []
    tokens: list[dict[str, Any]] = []
    async for _, delta in generation.deltas():
        answer.take(delta)
        text.append(delta.text)
        tokens += logprobs(delta)["logprobs"] if answer.logprobs else []
    shown = {"logprobs": tokens} if answer.logprobs else {}
    return {**answer.head(), **answer.content("".join(text)), **shown, **answer.ending(generation)}


async def lines(answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """Lines of JSON; after a failure one that says so, and no more."""
    try:
        async for _, delta in generation.deltas():
            answer.take(delta)
            if delta.text or (answer.logprobs and delta.tokens):
                shown = logprobs(delta) if answer.logprobs else {}
                yield line({**answer.head(), **answer.content(delta.text), **shown, "done": False})
        yield line({**answer.head(), **answer.content(""), **answer.ending(generation)})
    except PagewireError as error:
        log.warning("stream failed", error=error.message)
        yield line(error_object(error))


def line(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content) + b"\n"
