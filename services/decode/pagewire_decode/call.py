"""One Decode call: takes what the engine says of its request, and has it ready as messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import structlog
from pagewire.v1 import common_pb2, decode_pb2
from pagewire_core.errors import PagewireError
from pagewire_core.feed import Feed
from pagewire_core.tracing import Span
from pagewire_engine.events import Event, Failed, Finished, PromptScores, Started, Token
from pagewire_engine.metrics import StageMetrics
from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from pagewire_engine.wire import scores_to_proto, to_proto

log = structlog.get_logger(__name__)


class Call:
    """The first tokens go into DecodeStarted, all others (and every end) to the feed or into DecodeTokens.

    A call that is resumed has no first tokens: it has started when it begins. With a feed only the begin
    and the end wake the call's own task.
    """

    def __init__(self, request: decode_pb2.DecodeRequest, feed: Feed[decode_pb2.FeedResponse] | None) -> None:
        params = SamplingParams.from_proto(request.sampling)
        self.request = request
        self.work = Request(request.request_id, list(request.prompt_ids), request.cache_root, params,
                            max(request.n, 1), self.take)  # fmt: skip
        if request.local_prefill and request.HasField("prompt_logprobs") and not request.prior:
            self.work.prompt_logprobs = request.prompt_logprobs
        self.known = decode_pb2.DecodeStarted()  # what it will say beside the first tokens
        self.cached_tokens = 0
        self.started_at: float | None = None
        self._feed = feed
        self._num_entries = 0
        self._first: list[Sampled] = []
        self._scores: list[PromptScores] = []
        self._num_first = 0 if request.prior else self.work.n
        self._first_at = 0.0
        self._tokens = decode_pb2.DecodeTokens()  # not yet sent
        self._finished: Finished | None = None
        self._error: PagewireError | None = None
        self._wake = asyncio.Event()
        if request.prior:
            self._wake.set()

    @property
    def prior(self) -> list[list[int] | None]:
        """The output that each choice already has; None: it has ended."""
        return [None if output.ended else list(output.token_ids) for output in self.request.prior]

    def take(self, event: Event) -> None:
        """One event of the engine, in the event loop."""
        match event:
            case Token():
                if not self._take_token(event):
                    return
            case Started(cached_tokens):
                self.cached_tokens, self.started_at = cached_tokens, time.monotonic()
                return
            case PromptScores():
                self._scores.append(event)
                return
            case Finished():
                self._finished = event
            case Failed(error):
                self._error = error
        self._wake.set()

    async def responses(self, stages: StageMetrics) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """What goes over the call's own stream. Raises PagewireError."""
        started = finished = False
        while not finished:
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
            finished = self._finished is not None
            if not started and len(self._first) == self._num_first:
                started = True
                for scores in self._scores:
                    yield decode_pb2.DecodeResponse(prompt_logprobs=scores_to_proto(scores))
                yield decode_pb2.DecodeResponse(started=self._started())
            if started and self._tokens.choices:
                tokens, self._tokens = self._tokens, decode_pb2.DecodeTokens()
                yield decode_pb2.DecodeResponse(tokens=tokens)
        yield decode_pb2.DecodeResponse(finished=self._ended(stages))

    def describe(self, span: Span) -> None:
        """The call's stages, as far as it came, as spans under its own."""
        if not span.recording:
            return
        first_at = self._first_at or None
        if not self.request.local_prefill:
            span.child("await_kv", started=self.work.arrived).end(self.started_at)
        elif self.started_at is not None:
            span.child("queue", started=self.work.arrived).end(self.started_at)
            span.child("prefill", {
                "gen_ai.usage.prompt_tokens": len(self.work.prompt), "pagewire.cached_tokens": self.cached_tokens,
                "pagewire.computed_tokens": len(self.work.prompt) - self.cached_tokens,
            }, started=self.started_at).end(first_at)  # fmt: skip
        if first_at is not None:
            preemptions = self._finished.num_preemptions if self._finished else 0
            span.child("decode", {"pagewire.preemptions": preemptions}, started=first_at).end()
        span.set({
            "pagewire.local_prefill": self.request.local_prefill, "pagewire.resumed": bool(self.request.prior),
            "pagewire.cached_tokens": self.cached_tokens, "pagewire.transferred_tokens": self.known.received_tokens,
            "pagewire.transferred_bytes": self.known.received_bytes, "pagewire.lane": self.known.lane,
        })  # fmt: skip

    def _take_token(self, token: Token) -> bool:
        """Whether the call's own stream has something to say of it."""
        first = len(self._first) < self._num_first and token.choice == len(self._first)
        if first:
            self._first.append(token.sampled)
        if not first or token.finish_reason is not None:
            try:
                message = self._message(token.choice)
            except PagewireError as error:
                self._error = error
                return True
            if not first:
                message.tokens.append(to_proto(token.sampled))
            if token.finish_reason is not None:
                message.finish_reason = token.finish_reason
                if token.stop_token_id is not None:
                    message.stop_token_id = token.stop_token_id
        return first or self._feed is None

    def _message(self, choice: int) -> common_pb2.ChoiceTokens:
        """Where the choice's next tokens go: what is not yet sent of it is one message."""
        unsent: decode_pb2.DecodeTokens | decode_pb2.FeedEntry = self._tokens
        if self._feed is not None:
            unsent, new = self._feed.entry(self.request.feed_call)
            self._num_entries += new
        for message in unsent.choices:
            if message.choice == choice:
                return message
        return unsent.choices.add(choice=choice)

    def _started(self) -> decode_pb2.DecodeStarted:
        started = self.known
        self._first_at = time.monotonic()
        started.first_tokens.extend(to_proto(sampled) for sampled in self._first)
        started.cached_tokens = self.cached_tokens
        started.resumed = bool(self.request.prior)
        if self.request.local_prefill:
            started.computed_tokens = len(self.work.prompt) - self.cached_tokens
        return started

    def _ended(self, stages: StageMetrics) -> decode_pb2.DecodeFinished:
        assert self._finished is not None
        now = time.monotonic()
        began = self.started_at or self._first_at
        timings = common_pb2.StageTimings(decode_us=int((now - self._first_at) * 1e6))
        if self.request.local_prefill:
            timings.queue_us = int((began - self.work.arrived) * 1e6)
            timings.prefill_us = int((self._first_at - began) * 1e6)
            stages.observe(queue=began - self.work.arrived, prefill=self._first_at - began)
        stages.observe(decode=now - self._first_at)
        log.info("decode done", request_id=self.request.request_id, prompt_tokens=len(self.work.prompt),
                 local_prefill=self.request.local_prefill, decode_ms=timings.decode_us / 1e3,
                 preemptions=self._finished.num_preemptions)  # fmt: skip
        return decode_pb2.DecodeFinished(
            timings=timings, num_preemptions=self._finished.num_preemptions, feed_entries=self._num_entries
        )
