"""Deltas of the router as an OpenAI answer: streamed, or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Delta, Summary, TokenText
from pagewire_core.errors import PagewireError

from pagewire_bridge import sse
from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.generation import Generation
from pagewire_bridge.openai.errors import from_error
from pagewire_bridge.openai.prompts import Echo, listed
from pagewire_bridge.openai.schema import StreamOptions
from pagewire_bridge.openai.shapes import Choice, Shape
from pagewire_bridge.served_by import account
from pagewire_bridge.tools.calls import Call, Piece, Text, Thought, joined

log = structlog.get_logger(__name__)

FINISH_REASONS: dict[int, str] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True)
class Answer:
    """What every chunk of one answer, or the whole of it, is made with.

    head: id, created, model, system_fingerprint. stop_token_ids: the client's own, which it may see
    again as a stop_reason; the model's end-of-sequence ids are not shown. prompt_token_ids: per prompt,
    None unless the client wants token ids beside the text. parsers: of each choice, if there is more in it than
    content. named_tool: the one call is what was asked for, and no reason to stop. functions: the client does not know
    tools. echo: of prompts whose tokens come before the choices'. prompt_logprobs: how many of the best are listed in
    the place of each of a prompt's tokens.
    """

    shape: Shape
    head: dict[str, Any]
    num_choices: int
    logprobs: bool
    stop_token_ids: frozenset[int]
    prompt_token_ids: Sequence[list[int]] | None = None
    parsers: Sequence[AnswerParser] = ()
    named_tool: bool = False
    functions: bool = False
    include_reasoning: bool = True
    echo: Echo | None = None
    prompt_logprobs: int | None = None

    def stream(self, generation: Generation, told: StreamedUsage) -> AsyncGenerator[bytes]:
        """Its events."""
        head, opened = {**self.head, "object": self.shape.chunk_object}, set[int]()
        return stream(head, lambda index, delta: self.choices(index, delta, opened), self.usage, generation, told)

    def stop_reason(self, delta: Delta) -> str | int | None:
        if delta.HasField("stop_string"):
            return delta.stop_string
        return delta.stop_token_id if delta.stop_token_id in self.stop_token_ids else None

    def choices(self, index: int, delta: Delta, opened: set[int]) -> Iterator[Choice]:
        """The chunks' choices that a delta gives; none if it has neither news for the client nor an end."""
        pieces, tokens = self.pieces(index, delta), self.tokens(index, delta)
        ids = [token.token_id for token in delta.tokens] if self.prompt_token_ids is not None else []
        finish_reason = FINISH_REASONS.get(delta.finish_reason)
        if not (pieces or tokens or ids or finish_reason):
            return
        if index not in opened:
            opened.add(index)
            yield from self.shape.opening(index, bool(pieces) and isinstance(pieces[0], Call))
        if pieces or tokens or ids:
            first, *others = pieces or [Text("")]
            yield {**self.shape.delta(index, first, tokens), **({"token_ids": ids} if ids else {})}
            for piece in others:
                yield self.shape.delta(index, piece, None)
        if finish_reason:
            yield self.shape.ending(index, self.finish_reason(index, finish_reason), self.stop_reason(delta))

    def tokens(self, index: int, delta: Delta) -> Sequence[TokenText] | None:
        """Those whose log probabilities the client is told with a delta; None: it did not ask."""
        if not self.logprobs:
            return None
        return [*self.echo.before(index, delta.text), *delta.tokens] if self.echo else delta.tokens

    def pieces(self, index: int, delta: Delta) -> list[Piece]:
        """What a delta says."""
        if not self.parsers:
            return [Text(delta.text)] if delta.text else []
        parser = self.parsers[index]
        parser.count(delta.tokens)
        pieces = parser.push(delta.text)
        if delta.finish_reason in FINISH_REASONS:
            pieces += parser.finish()
        return [piece for piece in pieces if self.include_reasoning or not isinstance(piece, Thought)]

    def finish_reason(self, index: int, reason: str) -> str:
        called = bool(self.parsers) and self.parsers[index].num_calls > 0
        if not called or reason != "stop" or self.named_tool:
            return reason
        return "function_call" if self.functions else "tool_calls"

    def usage(self, summaries: Sequence[Summary]) -> dict[str, Any]:
        counted = usage(summaries)
        if self.parsers:
            num_thought = sum(parser.num_thought for parser in self.parsers)
            counted["completion_tokens_details"] = {"reasoning_tokens": num_thought}
        return counted


def usage(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Tokens over all prompts and choices; a prompt counts once however many choices it has."""
    prompt = sum(s.prompt_tokens for s in summaries)
    completion = sum(s.completion_tokens for s in summaries)
    cached = sum(s.cached_tokens for s in summaries)
    return {**_counted(prompt, completion), "prompt_tokens_details": {"cached_tokens": cached}}


def _counted(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class StreamedUsage:
    """What a stream tells of its tokens: `at_end` in a chunk of its own, `so_far` in every chunk before."""

    at_end: bool
    so_far: bool

    @classmethod
    def asked(cls, options: StreamOptions | None, always: bool) -> StreamedUsage:
        """always: the server's own setting, which needs no options."""
        at_end = always or bool(options and options.include_usage)
        return cls(at_end, at_end and bool(options and options.continuous_usage_stats))

    def fields(self, generation: Generation) -> dict[str, Any]:
        """Of a chunk that is not the last."""
        if self.so_far:
            return {"usage": _counted(generation.num_prompt_tokens, generation.num_output_tokens)}
        return {"usage": None} if self.at_end else {}


async def stream(
    head: Mapping[str, Any],
    choices: Callable[[int, Delta], Iterable[Choice]],
    count: Callable[[Sequence[Summary]], dict[str, Any]],
    generation: Generation,
    told: StreamedUsage,
) -> AsyncGenerator[bytes]:
    """Encoded events up to [DONE]; a failure is one error event, and then neither usage nor [DONE].

    head: of every chunk. choices: those of the chunks that a delta gives. count: the usage, at the end.
    """
    try:
        async for index, delta in generation.deltas():
            for choice in choices(index, delta):
                yield sse.event({**head, "choices": [choice], **told.fields(generation)})
    except PagewireError as error:
        log.warning("request failed after its answer began", error=type(error).__name__)
        yield sse.event(from_error(error))
        return
    if told.at_end:
        summaries = generation.summaries
        yield sse.event({**head, "choices": [], "usage": count(summaries), "pagewire": account(summaries)})
    yield sse.DONE


@dataclass
class _Collected:
    pieces: list[Piece] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None


async def whole(answer: Answer, generation: Generation) -> dict[str, Any]:
    """The response object. Raises PagewireError."""
    collected = [_Collected() for _ in range(answer.num_choices)]
    async for index, delta in generation.deltas():
        choice = collected[index]
        choice.pieces += answer.pieces(index, delta)
        choice.tokens.extend(answer.tokens(index, delta) or ())
        choice.token_ids.extend(token.token_id for token in delta.tokens)
        if delta.finish_reason in FINISH_REASONS:
            choice.finish_reason = answer.finish_reason(index, FINISH_REASONS[delta.finish_reason])
            choice.stop_reason = answer.stop_reason(delta)
    choices = [
        answer.shape.whole(i, joined(c.pieces), c.tokens if answer.logprobs else None, c.finish_reason, c.stop_reason)
        for i, c in enumerate(collected)
    ]
    if answer.prompt_token_ids is not None:
        per_prompt = answer.num_choices // len(answer.prompt_token_ids)
        for i, (shaped, c) in enumerate(zip(choices, collected, strict=True)):
            shaped["token_ids"] = c.token_ids
            shaped["prompt_token_ids"] = answer.prompt_token_ids[i // per_prompt]
    response = {
        **answer.head,
        "object": answer.shape.object,
        "choices": choices,
        "usage": answer.usage(generation.summaries),
    }
    if answer.prompt_logprobs is not None:
        # Of long prompts these are a million entries: other answers go on meanwhile.
        listing = (asyncio.to_thread(listed, tokens, answer.prompt_logprobs) for tokens in generation.prompt_tokens)
        answer.shape.with_prompts(response, [await one for one in listing])
    return response
