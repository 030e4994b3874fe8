"""The life of one admitted request: attempts, what may be retried, deltas and the summary.

An attempt is lost when a leg of it fails. It is tried again, on other workers if there are others, at
most MAX_ATTEMPTS times, and only while the client has at most each choice's first token: from then on
a lost decode worker ends the request with an error. A decode worker without room is no lost attempt;
the request looks for another one and then waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass

import structlog
from pagewire.v1 import common_pb2, decode_pb2, inference_pb2, prefill_pb2
from pagewire_core.errors import (
    ContextLength,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PagewireError,
    Unavailable,
)
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.account import Account
from pagewire_router.attempt import Attempt, Event, LegFailed
from pagewire_router.choice import Choice
from pagewire_router.metrics import RouterMetrics
from pagewire_router.placement import Placed, Placement
from pagewire_router.request import ValidRequest
from pagewire_router.workers import WorkerTable

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
_NO_WORKER_WAIT_S = 10.0  # a worker that is restarted is back by then
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.02, 0.5
_CLIENTS_FAULT = (InvalidRequest, ContextLength, ModelNotFound)


@dataclass(frozen=True)
class Services:
    """What every generation of a router shares."""

    workers: WorkerTable
    placement: Placement
    tokenizer: Tokenizer
    metrics: RouterMetrics
    transfer_timeout_s: float


class Generation:
    """Iterate `responses` once. `deadline` is on the loop's clock.

    Raises PagewireError until Accepted was yielded; a later failure is yielded as an error.
    """

    def __init__(self, request: ValidRequest, services: Services, account: Account, deadline: float) -> None:
        self._request = request
        self._services = services
        self._account = account
        self._deadline = deadline
        self._choices = [Choice(i, request, services.tokenizer) for i in range(request.n)]
        self._accepted = False
        self._avoid: set[str] = set()  # workers that failed this request
        self._refused: set[str] = set()  # workers that had no room
        self._backoff_s = _MIN_BACKOFF_S
        self._failures = 0
        self.outcome = "internal"  # unless one of the ends below says otherwise

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.ids) for c in self._choices)

    async def responses(self) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            async with contextlib.aclosing(self._attempts()) as responses:
                async for response in responses:
                    yield response
            self.outcome = "ok"
        except (asyncio.CancelledError, GeneratorExit):
            self.outcome = "cancelled"
            raise
        except PagewireError as error:
            self.outcome = common_pb2.ErrorCode.Name(error.code).removeprefix("ERROR_CODE_").lower()
            if not self._accepted:
                raise
            yield inference_pb2.GenerateResponse(error=error.to_proto())

    async def _attempts(self) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        while True:
            placed = await self._place()
            try:
                async with Attempt(self._request, placed, self._deadline, self._services.transfer_timeout_s) as attempt:
                    async with contextlib.aclosing(self._run(attempt)) as responses:
                        async for response in responses:
                            yield response
                yield inference_pb2.GenerateResponse(summary=self._account.summary(self.completion_tokens))
                return
            except LegFailed as failure:
                self._judge(failure)

    async def _place(self) -> Placed:
        """Workers for the next attempt; waits for one to join or to have room again."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _NO_WORKER_WAIT_S
        if self._failures > 1:  # the first retry is at once, a second gives what is broken a moment
            await asyncio.sleep(_MAX_BACKOFF_S)
        while True:
            placed = self._services.placement.place(self._request, self._avoid, self._refused)
            if placed is not None:
                return placed
            if clock() >= self._deadline:
                raise DeadlineExceeded("no decode worker had room for the request in time")
            if self._refused:
                await asyncio.sleep(self._backoff_s)
                self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)
                self._refused.clear()
            elif clock() >= give_up:
                raise Unavailable("no worker can serve this request now; start a decode worker", retry_after_s=5.0)
            else:
                await self._services.workers.wait_changed(min(0.5, self._deadline - clock()))

    async def _run(self, attempt: Attempt) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        await attempt.reserve()
        self._account.begin_attempt(attempt.placed)
        self._services.metrics.routes.labels(attempt.placed.decision).inc()
        for choice in self._choices:
            choice.rewind()
        async with contextlib.aclosing(attempt.events()) as events:
            async for event in events:
                if not self._accepted:
                    self._accepted = True
                    for response in self._opening():
                        yield response
                for delta in self._deltas(event, attempt.placed):
                    yield inference_pb2.GenerateResponse(delta=delta)
                if await self._stop_ended(attempt, event):
                    return

    def _opening(self) -> Iterator[inference_pb2.GenerateResponse]:
        request = self._request
        yield inference_pb2.GenerateResponse(
            accepted=inference_pb2.Accepted(
                request_id=request.request_id,
                model=request.model,
                prompt_tokens=len(request.prompt_ids),
                prompt_token_ids=request.prompt_ids if request.return_prompt_token_ids else (),
            )
        )
        if request.echo_text is not None:
            for choice in self._choices:
                delta = inference_pb2.Delta(choice=choice.index, text=request.echo_text)
                yield inference_pb2.GenerateResponse(delta=delta)

    def _deltas(self, event: Event, placed: Placed) -> Iterator[inference_pb2.Delta]:
        if isinstance(event, decode_pb2.FeedEntry):
            yield from self._tokens(event.choices, placed)
            return
        account = self._account
        kind = event.WhichOneof("event")
        if isinstance(event, prefill_pb2.PrefillResponse):
            if kind == "started":
                account.prefill_cached = event.started.cached_tokens
            elif kind == "first_tokens":
                yield from self._first(event.first_tokens.tokens)
            elif kind == "kv_sent":
                self._note_kv_sent(event.kv_sent, placed)
        elif kind == "started":
            account.started.CopyFrom(event.started)
            yield from self._first(event.started.first_tokens)
        elif kind == "tokens":
            yield from self._tokens(event.tokens.choices, placed)
        elif kind == "finished":
            account.finished.CopyFrom(event.finished)
            self._check_all_finished(placed)

    def _note_kv_sent(self, sent: prefill_pb2.KvSent, placed: Placed) -> None:
        self._account.kv_sent.CopyFrom(sent)
        assert placed.prefill is not None
        self._services.placement.rates.observe(
            placed.prefill.worker_id, placed.decode.worker_id, sent.transferred_bytes, sent.timings.transfer_us / 1e6
        )

    def _first(self, tokens: Iterable[common_pb2.SampledToken]) -> Iterator[inference_pb2.Delta]:
        for choice, token in zip(self._choices, tokens, strict=False):
            delta = choice.take_first(token)
            if delta is not None:
                yield self._counted(delta)

    def _tokens(self, step: Iterable[common_pb2.ChoiceTokens], placed: Placed) -> Iterator[inference_pb2.Delta]:
        for given in step:
            if given.choice >= len(self._choices):
                raise LegFailed("decode", placed.decode.worker_id, Unavailable("tokens for a choice that is not there"))
            reason = given.finish_reason
            if reason in (common_pb2.FINISH_REASON_ABORT, common_pb2.FINISH_REASON_ERROR):
                raise LegFailed("decode", placed.decode.worker_id, Unavailable("the decode worker gave the choice up"))
            stop_id = given.stop_token_id if given.HasField("stop_token_id") else None
            delta = self._choices[given.choice].take(given.tokens, reason, stop_id)
            if delta is not None:
                yield self._counted(delta)

    def _counted(self, delta: inference_pb2.Delta) -> inference_pb2.Delta:
        if delta.tokens:
            self._account.note_tokens(delta.choice, len(delta.tokens), self._services.metrics)
        return delta

    def _check_all_finished(self, placed: Placed) -> None:
        if not all(c.finished for c in self._choices):
            raise LegFailed("decode", placed.decode.worker_id, Unavailable("a choice was left unfinished"))

    async def _stop_ended(self, attempt: Attempt, event: Event) -> bool:
        """Tells the decode worker of choices that a stop string ended; True if that ends the attempt."""
        stopped = [c.index for c in self._choices if c.stopped_by_string and c.index not in attempt.stopped]
        if not stopped:
            return False
        if all(c.finished for c in self._choices):
            return isinstance(event, decode_pb2.FeedEntry) or event.WhichOneof("event") != "finished"
        attempt.stopped.update(stopped)
        await attempt.stop_choices(stopped)
        return False

    def _judge(self, failure: LegFailed) -> None:
        """Prepares the next attempt, or raises what the client is to be told."""
        error = failure.error
        if isinstance(error, _CLIENTS_FAULT):
            raise error
        past_first_token = any(len(c.ids) > 1 for c in self._choices)
        if isinstance(error, Overloaded) and not past_first_token:
            self._refused.add(failure.worker_id)
            return
        self._failures += 1
        self._services.metrics.retries.labels(failure.leg).inc()
        log.warning(
            "attempt lost", request_id=self._request.request_id, leg=failure.leg, worker_id=failure.worker_id,
            error=error.message, failures=self._failures,
        )  # fmt: skip
        if self._failures >= MAX_ATTEMPTS or past_first_token:
            raise _told(failure)
        self._avoid.add(failure.worker_id)


def _told(failure: LegFailed) -> PagewireError:
    """What a client is told of a failed leg: cancelling and so on were the worker's, not the client's."""
    what = {"prefill": "prefill worker", "decode": "decode worker", "reserve": "decode worker"}[failure.leg]
    return Unavailable(f"the {what} was lost: {failure.error.message}", retry_after_s=1.0)
