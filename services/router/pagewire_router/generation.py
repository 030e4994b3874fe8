"""The life of one admitted request: attempts, what may be retried, deltas and the summary.

An attempt is lost when a leg of it fails. It is tried again, on other workers if there are others, until
MAX_ATTEMPTS in a row have given the client nothing; the last of them is one worker's alone, for
nothing that lies between two workers can fail it. While the client has at most each choice's first
token, an attempt begins at the prompt's end; from then on it goes on after what the client has, so that
the client sees what it would have seen without the loss. A decode worker without room is no lost
attempt; the request looks for another one and then waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import structlog
from pagewire.v1 import common_pb2, decode_pb2, inference_pb2, prefill_pb2
from pagewire_core import faults
from pagewire_core.errors import (
    ContextLength,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PagewireError,
    TransferLost,
    Unavailable,
)
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.account import Account
from pagewire_router.attempt import Attempt, Event, LegFailed
from pagewire_router.choice import Choice
from pagewire_router.lessons import learn, learn_end, learn_failure
from pagewire_router.metrics import RouterMetrics
from pagewire_router.placement import Placed, Placement
from pagewire_router.prompt_scores import PromptScores
from pagewire_router.request import ValidRequest
from pagewire_router.spans import AttemptSpans
from pagewire_router.workers import Worker, WorkerTable

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
_NO_WORKER_WAIT_S = 10.0  # a worker that is restarted is back by then
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.02, 0.5
_CLIENTS_FAULT = (InvalidRequest, ContextLength, ModelNotFound)


@dataclass(frozen=True)
class Services:
    """What every generation of a router shares."""

    workers: WorkerTable
    placement: Placement[Worker]
    tokenizer: Tokenizer
    metrics: RouterMetrics
    transfer_timeout_s: float


class Generation:
    """Iterate `responses` once. `deadline` is on the loop's clock.

    Raises PagewireError until Accepted was yielded; a later failure is yielded as an error. Deltas go to
    `send` if it is given, between the responses that surround them; else they are responses, too.
    """

    def __init__(
        self,
        request: ValidRequest,
        services: Services,
        account: Account,
        deadline: float,
        send: Callable[[inference_pb2.Delta], None] | None = None,
    ) -> None:
        self._request = request
        self._services = services
        self._account = account
        self._deadline = deadline
        self._choices = [Choice(i, request, services.tokenizer) for i in range(request.n)]
        self._scores = PromptScores(request.prompt_ids)
        self._unsent: list[inference_pb2.GenerateResponse] = []
        self._has_stop_strings = bool(request.sampling.stop)
        self._may_send_at_once = send is not None
        self._send = send or self._respond
        self._accepted = False
        self._told_stopped: set[int] = set()  # choices that the attempt's decode worker was told to end
        self._avoid: set[str] = set()  # workers that failed this request
        self._refused: set[str] = set()  # workers that had no room
        self._backoff_s = _MIN_BACKOFF_S
        self._failures = 0  # since the client was given something
        self._undecided: list[tuple[Placed[Worker], LegFailed]] = []  # whether they are the request's own fault
        self._given_before = 0  # tokens, when the last failure was judged
        self.outcome = "internal"  # unless one of the ends below says otherwise

    @property
    def answer_tokens(self) -> list[int]:
        """How many each choice has been given."""
        return [] if self._request.prompt_only else [len(choice.ids) for choice in self._choices]

    @property
    def completion_tokens(self) -> int:
        return sum(self.answer_tokens)

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
            self.outcome = outcome_of(error)
            if not self._accepted:
                raise
            self._account.span.fail(error)
            for response in self._take_unsent():
                yield response
            yield inference_pb2.GenerateResponse(error=error.to_proto())

    async def _attempts(self) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        while True:
            placed = await self._place()
            try:
                async with self._attempt(placed) as attempt:
                    async with contextlib.aclosing(self._run(attempt)) as responses:
                        async for response in responses:
                            yield response
                learn_end(self._services.placement, placed, self._request, self.completion_tokens)
                yield inference_pb2.GenerateResponse(summary=self._account.summary(self.completion_tokens))
                return
            except LegFailed as failure:
                if all(choice.finished for choice in self._choices):  # only the account of it is lost
                    yield inference_pb2.GenerateResponse(summary=self._account.summary(self.completion_tokens))
                    return
                self._judge(failure, placed)

    async def _place(self) -> Placed[Worker]:
        """Workers for the next attempt; waits for one to join or to have room again."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _NO_WORKER_WAIT_S
        if self._failures > 1:  # the first retry is at once, a second gives what is broken a moment
            await asyncio.sleep(_MAX_BACKOFF_S)
        last = self._failures == MAX_ATTEMPTS - 1
        while True:
            placed = self._services.placement.place(self._request, self._avoid, self._refused, alone=last)
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

    def _attempt(self, placed: Placed[Worker]) -> Attempt:
        take = partial(self._take, placed) if self._may_send_at_once else None
        prior, timeout_s = self._prior_output(), self._services.transfer_timeout_s
        spans = AttemptSpans(self._account.span, placed, self._account.attempts + 1, resumed=bool(prior))
        return Attempt(self._request, placed, self._deadline, timeout_s, take, prior, spans)

    @property
    def _past_first_token(self) -> bool:
        return bool(self._request.prior) or any(len(choice.ids) > 1 for choice in self._choices)

    def _prior_output(self) -> list[decode_pb2.PriorOutput]:
        """What the client has of each choice; nothing while that is little enough to be made again."""
        if not self._past_first_token:
            return []
        return [decode_pb2.PriorOutput(token_ids=choice.ids, ended=choice.finished) for choice in self._choices]

    def _take(self, placed: Placed[Worker], entry: decode_pb2.FeedEntry) -> bool:
        """Passes tokens on; True if more is to be done than that."""
        self._tokens(entry.choices, placed)
        return self._has_stop_strings and bool(self._newly_stopped())

    async def _run(self, attempt: Attempt) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        await attempt.reserve()
        self._account.begin_attempt(attempt.placed, resumed=self._past_first_token)
        self._services.metrics.routes.labels(attempt.placed.decision).inc()
        self._told_stopped.clear()
        self._scores.rewind()
        for choice in self._choices:
            choice.rewind()
        async with contextlib.aclosing(attempt.events()) as events:
            async for event in events:
                if not self._accepted:
                    self._accepted = True
                    yield opening(self._request)
                    if self._request.prompt_logprobs is None:
                        self._echo()
                if self._request.prompt_logprobs is not None and _tells_first_tokens(event):
                    for response in self._prompt_tokens(attempt.placed):
                        yield response
                self._note(event, attempt.placed)
                for response in self._take_unsent():
                    yield response
                if await self._stop_ended(attempt, event):
                    return

    def _respond(self, delta: inference_pb2.Delta) -> None:
        self._unsent.append(inference_pb2.GenerateResponse(delta=delta))

    def _take_unsent(self) -> list[inference_pb2.GenerateResponse]:
        unsent, self._unsent = self._unsent, []
        return unsent

    def _echo(self) -> None:
        if self._request.echo_text is not None:
            for choice in self._choices:
                self._send(inference_pb2.Delta(choice=choice.index, text=self._request.echo_text))

    def _note(self, event: Event, placed: Placed[Worker]) -> None:
        if isinstance(event, decode_pb2.FeedEntry):
            self._tokens(event.choices, placed)
            return
        learn(self._services.placement, placed, event)
        account = self._account
        kind = event.WhichOneof("event")
        if kind == "prompt_logprobs":
            self._scores.take(event.prompt_logprobs)
        if isinstance(event, prefill_pb2.PrefillResponse):
            if kind == "started":
                account.note_prefill(event.started)
            elif kind == "first_tokens":
                self._first(event.first_tokens.tokens)
            elif kind == "kv_sent":
                account.note_kv_sent(event.kv_sent, self._services.metrics)
        elif kind == "started":
            account.note_decode(event.started)
            self._first(event.started.first_tokens)
            if event.started.resumed:
                self._resume()
        elif kind == "tokens":
            self._tokens(event.tokens.choices, placed)
        elif kind == "finished":
            account.finished.CopyFrom(event.finished)
            self._check_all_finished(placed)

    def _prompt_tokens(self, placed: Placed[Worker]) -> Iterator[inference_pb2.GenerateResponse]:
        """Once: whoever takes over needs not tell them again, and may read the prompt from its cache."""
        if not self._scores.complete:
            lacking = Unavailable("the prompt's log probabilities are not there")
            raise LegFailed("prefill", (placed.prefill or placed.decode).worker_id, lacking)
        yield from self._scores.responses(self._services.tokenizer)
        self._scores.rewind()
        self._request = replace(self._request, prompt_logprobs=None)
        self._echo()

    def _resume(self) -> None:
        for choice in self._choices:
            choice.resume()
        if not self._request.is_step:
            self._services.metrics.resumed.inc()

    def _first(self, tokens: Iterable[common_pb2.SampledToken]) -> None:
        if self._request.prior:  # beams have other tokens there
            return
        for choice, token in zip(self._choices, tokens, strict=False):
            self._send_counted(choice.take_first(token))

    def _tokens(self, step: Iterable[common_pb2.ChoiceTokens], placed: Placed[Worker]) -> None:
        for given in step:
            if given.choice >= len(self._choices):
                raise LegFailed("decode", placed.decode.worker_id, Unavailable("tokens for a choice that is not there"))
            reason, stop_id = given.finish_reason, None
            if reason:
                if reason in (common_pb2.FINISH_REASON_ABORT, common_pb2.FINISH_REASON_ERROR):
                    gave_up = Unavailable("it gave the choice up")
                    raise LegFailed("decode", placed.decode.worker_id, gave_up)
                stop_id = given.stop_token_id if given.HasField("stop_token_id") else None
            self._send_counted(self._choices[given.choice].take(given.tokens, reason, stop_id))

    def _send_counted(self, delta: inference_pb2.Delta | None) -> None:
        if delta is None:
            return
        faults.point("relay")
        if self._undecided and delta.tokens:
            self._learn_undecided()
        if delta.tokens and not self._request.is_step:
            self._account.note_tokens(delta.choice, len(delta.tokens), self._services.metrics)
        if delta.finish_reason and not self._request.is_step:
            self._services.metrics.count_finished(delta.finish_reason)
        self._send(delta)

    def _check_all_finished(self, placed: Placed[Worker]) -> None:
        if not all(c.finished for c in self._choices):
            raise LegFailed("decode", placed.decode.worker_id, Unavailable("a choice was left unfinished"))

    def _newly_stopped(self) -> list[int]:
        """Choices that a stop string ended, of which the decode worker has not yet been told."""
        return [c.index for c in self._choices if c.stopped_by_string and c.index not in self._told_stopped]

    async def _stop_ended(self, attempt: Attempt, event: Event) -> bool:
        """Tells the decode worker of choices that a stop string ended; True if that ends the attempt."""
        stopped = self._newly_stopped()
        if not stopped:
            return False
        if all(c.finished for c in self._choices):
            return isinstance(event, decode_pb2.FeedEntry) or event.WhichOneof("event") != "finished"
        if not attempt.started:  # it has no choices yet; what the first token ended it is told of then
            return False
        self._told_stopped.update(stopped)
        await attempt.stop_choices(stopped)
        return False

    def _judge(self, failure: LegFailed, placed: Placed[Worker]) -> None:
        """Prepares the next attempt, or raises what the client is to be told."""
        error = failure.error
        if isinstance(error, _CLIENTS_FAULT):
            raise error
        if isinstance(error, Overloaded):
            self._refused.add(failure.worker_id)
            return
        if isinstance(error, Internal):
            self._undecided.append((placed, failure))
        else:
            learn_failure(self._services.placement, placed, self._request, failure)
        given, self._given_before = self._given_before, self.completion_tokens
        self._failures = 1 if self.completion_tokens > given else self._failures + 1
        self._services.metrics.retries.labels(failure.leg).inc()
        log.warning(
            "attempt lost", request_id=self._request.request_id, leg=failure.leg, worker_id=failure.worker_id,
            error=error.message, failures=self._failures,
        )  # fmt: skip
        if self._failures >= MAX_ATTEMPTS:
            raise _told(failure, placed)
        self._avoid.add(failure.worker_id)
        self._refused.clear()  # by now they may have room

    def _learn_undecided(self) -> None:
        """An attempt got past where others failed: that was these workers' fault.

        What fails wherever it is tried, as where the model computes no numbers for it, opens no circuit breaker.
        """
        for placed, failure in self._undecided:
            learn_failure(self._services.placement, placed, self._request, failure)
        self._undecided.clear()


def opening(request: ValidRequest) -> inference_pb2.GenerateResponse:
    accepted = inference_pb2.Accepted(
        request_id=request.request_id,
        model=request.model,
        prompt_tokens=len(request.prompt_ids),
        prompt_token_ids=request.prompt_ids if request.return_prompt_token_ids else (),
        prompt_tail=request.prompt_tail,
        max_tokens_clipped=request.max_tokens_clipped,
        seed=request.sampling.seed,
    )
    return inference_pb2.GenerateResponse(accepted=accepted)


def outcome_of(error: PagewireError) -> str:
    """As metrics and logs name it."""
    return common_pb2.ErrorCode.Name(error.code).removeprefix("ERROR_CODE_").lower()


def _told(failure: LegFailed, placed: Placed[Worker]) -> PagewireError:
    """What a client is told of a failed leg: cancelling and so on were the worker's, not the client's."""
    computing = failure.leg == "prefill" and placed.prefill is not None
    what, error = "prefill worker" if computing or not placed.decode.can_decode else "decode worker", failure.error
    if isinstance(error, Internal):
        return Internal(f"the {what} failed: {error.message}")
    what = "KV transfer" if isinstance(error, TransferLost) else what
    return Unavailable(f"the {what} was lost: {error.message}", retry_after_s=1.0)


def _tells_first_tokens(event: Event) -> bool:
    """All that was asked of the prompt must be there then."""
    if isinstance(event, prefill_pb2.PrefillResponse):
        return event.HasField("first_tokens")
    return isinstance(event, decode_pb2.DecodeResponse) and event.HasField("started")
