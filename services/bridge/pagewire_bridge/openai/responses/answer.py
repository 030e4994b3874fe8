"""Deltas of the router as a response of OpenAI's Responses API, and as the events that tell how it comes to be.

    response.created, (response.queued,) response.in_progress, ITEM ..., response.completed | incomplete | failed

    ITEM       output_item.added, (content_part.added, TEXT, content_part.done | ARGUMENTS | INPUT), output_item.done
    TEXT       output_text.delta ..., output_text.done, or the same of reasoning_text
    ARGUMENTS  function_call_arguments.delta ..., function_call_arguments.done
    INPUT      custom_tool_call_input.delta ..., custom_tool_call_input.done

The whole answer is what these events add up to: there is no second way to it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, Summary, TokenText
from pagewire_core.errors import PagewireError

from pagewire_bridge import sse
from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.generation import Generation
from pagewire_bridge.openai.errors import from_error
from pagewire_bridge.openai.responses.output import Fields, OutputItem, output_item
from pagewire_bridge.tools.calls import Piece, Text, Thought, joined

log = structlog.get_logger(__name__)

_ENDS = {common_pb2.FINISH_REASON_STOP: "completed", common_pb2.FINISH_REASON_LENGTH: "incomplete"}
# What `error.code` may be, for clients that know no other.
_CODES = {common_pb2.ERROR_CODE_OVERLOADED: "rate_limit_exceeded", common_pb2.ERROR_CODE_INVALID_REQUEST:
          "invalid_prompt", common_pb2.ERROR_CODE_CONTEXT_LENGTH: "invalid_prompt"}  # fmt: skip
_LAST = tuple(f"event: response.{end}\n".encode() for end in ("completed", "incomplete", "failed"))


class Answer:
    """One response from its beginning to its end; every call returns the events that it makes.

    Order: (queue,) begin, take of each delta, then end or fail, then last. head: what the answer does not change.
    parser: where the text is more than text. called: of functions in namespaces, as in tools.py.
    """

    def __init__(
        self, head: Fields, parser: AnswerParser | None = None, *, with_logprobs: bool = False,
        called: Mapping[str, Fields] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.head, self.parser, self._called = head, parser, called
        self.status = "in_progress"
        self._with_logprobs = with_logprobs
        self._suffix = head["id"].rpartition("_")[2]
        self._output: list[Fields] = []
        self._open: OutputItem | None = None
        self._tokens: list[TokenText] = []  # of text that is not yet told
        self._num_events = 0
        self._ending: Fields = {"error": None, "incomplete_details": None, "usage": None}

    @property
    def response(self) -> Fields:
        """The response object as of now."""
        return {**self.head, "status": self.status, "output": self._output, **self._ending}

    def queue(self) -> list[Fields]:
        """It is told of before it begins."""
        self.status = "queued"
        return [self._event(kind) for kind in ("created", "queued")]

    def begin(self) -> list[Fields]:
        known, self.status = self.status == "queued", "in_progress"
        return [self._event(kind) for kind in ("created", "in_progress")[known:]]

    def take(self, delta: Delta) -> list[Fields]:
        """Of the items that a delta begins, continues and ends."""
        pieces: list[Piece] = [Text(delta.text)] if delta.text else []
        tokens: Sequence[TokenText] = delta.tokens
        if self.parser:
            tokens = self.parser.count(tokens)
            pieces = self.parser.push(delta.text)
            if delta.finish_reason in _ENDS:
                pieces = joined([*pieces, *self.parser.finish()])
        if self._with_logprobs:
            self._tokens += [token for token in tokens if not token.special]
        events = [event for piece in pieces for event in self._say(piece)]
        if delta.finish_reason in _ENDS:
            self.status = _ENDS[delta.finish_reason]
            if not self._output and not self._open:
                events += self._say(Text(""))
            events += self._close(self.status)
        return events

    def end(self, summary: Summary) -> None:
        """All deltas are there."""
        if self.status == "incomplete":
            self._ending["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._ending["completed_at"] = int(time.time())
        self._ending["usage"] = usage(summary, self.parser.num_thought if self.parser else 0)

    def fail(self, error: PagewireError) -> list[Fields]:
        """Something went wrong on the way."""
        log.warning("response failed", error=error.message)
        events = self._close("incomplete")
        self.status = "failed"
        self._ending["error"] = {"code": _CODES.get(error.code, "server_error"), "message": error.message}
        return events

    def last(self) -> Fields:
        """The event that ends a stream."""
        return last_event(self.response, self._num_events)

    def _say(self, piece: Piece) -> list[Fields]:
        events: list[Fields] = []
        if self._open is None or not self._open.takes(piece):
            events += self._close("completed")
            self._open = output_item(piece, len(self._output), self._suffix, self._called)
            events += map(self._numbered, self._open.begin())
        events += map(self._numbered, self._open.add(piece, self._tokens if isinstance(piece, Text) else ()))
        if not isinstance(piece, Thought):  # whose tokens are not among them
            self._tokens = []
        return events

    def _close(self, status: str) -> list[Fields]:
        if self._open is None:
            return []
        events = [self._numbered(event) for event in self._open.end(status)]
        self._output.append(self._open.item)
        self._open = None
        return events

    def _event(self, kind: str) -> Fields:
        return self._numbered({"type": f"response.{kind}", "response": self.response})

    def _numbered(self, event: Fields) -> Fields:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        return event


def last_event(response: Fields, number: int) -> Fields:
    """Of a response that has ended. There is no event of one that was cancelled: it is incomplete."""
    kind = "incomplete" if response["status"] == "cancelled" else response["status"]
    return {"type": f"response.{kind}", "response": response, "sequence_number": number}


def error_event(error: PagewireError, number: int) -> Fields:
    """Of a stream that cannot go on, whatever becomes of its response."""
    told: Fields = from_error(error)["error"]  # type: ignore[assignment]
    fields = {"code": told["code"], "message": told["message"], "param": told["param"]}
    return {"type": "error", **fields, "sequence_number": number}


def usage(summary: Summary, num_thought: int) -> Fields:
    """num_thought: tokens of the answer that are thoughts. Nothing is charged for what the cache keeps."""
    prompt, completion = summary.prompt_tokens, summary.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": summary.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": prompt + completion,
    }


async def events(answer: Answer, generation: Generation) -> AsyncGenerator[Fields]:
    """Those between answer.begin and answer.last; a failure is a response that failed."""
    try:
        async for _, delta in generation.deltas():
            for event in answer.take(delta):
                yield event
        answer.end(generation.summaries[0])
    except PagewireError as error:
        for event in answer.fail(error):
            yield event


async def whole(answer: Answer, generation: Generation) -> None:
    """Raises PagewireError."""
    async for _, delta in generation.deltas():
        answer.take(delta)
    answer.end(generation.summaries[0])


def encoded(event: Fields) -> bytes:
    return sse.event(event, event["type"])


def is_last(event: bytes) -> bool:
    """Of an encoded one."""
    return event.startswith(_LAST)
