"""The life of one admitted beam search: rounds of requests for one more token, then the best beams as choices.

A round is a Generation like any other: placed, tried again and booked by itself. Its choices are the live beams, which
go on after what they have, as those of a lost attempt do; a decode worker has all but their last tokens in its prefix
cache. So whatever befalls a worker, the answer is the same. The search holds one place of the queue, for n sequences.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import PagewireError, from_proto

from pagewire_router.account import Account
from pagewire_router.beams import Beam, Beams
from pagewire_router.choice import Choice
from pagewire_router.generation import Generation, Services, opening, outcome_of
from pagewire_router.request import ValidRequest

_TOKENS_PER_MESSAGE = 256


class BeamSearch:
    """As Generation. Nothing is told before the search is over, so a failure is always raised."""

    def __init__(self, request: ValidRequest, services: Services, account: Account, deadline: float) -> None:
        assert request.length_penalty is not None
        sampling = request.sampling
        self._request, self._services, self._account, self._deadline = request, services, account, deadline
        self._beams = Beams(
            width=request.n,
            length_penalty=request.length_penalty,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=sampling.max_tokens,
            eos_ids=frozenset(sampling.eos_token_ids),
            ignore_eos=sampling.ignore_eos,
            keep_end=sampling.include_stop_str_in_output,
        )
        self.answer_tokens: list[int] = []
        self.outcome = "internal"

    async def responses(self) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            await self._search()
            yield opening(self._request)
            for index, beam in enumerate(self._beams.best()):
                for delta in self._told(index, beam):
                    yield inference_pb2.GenerateResponse(delta=delta)
            yield inference_pb2.GenerateResponse(summary=self._account.summary(sum(self.answer_tokens)))
            self.outcome = "ok"
        except (asyncio.CancelledError, GeneratorExit):
            self.outcome = "cancelled"
            raise
        except PagewireError as error:
            self.outcome = outcome_of(error)
            raise

    async def _search(self) -> None:
        beams = self._beams
        for length in range(beams.max_tokens):
            offered = await self._next(length)
            for index in range(len(offered)):
                self._account.note_tokens(index, 1, self._services.metrics)
            beams.advance(offered)
            if beams.settled:
                return

    async def _next(self, length: int) -> list[list[common_pb2.SampledToken]]:
        """For each live beam, which has so many tokens, its likeliest next ones. Raises PagewireError."""
        step, account = self._step(length), self._account_of_step(length)
        given: dict[int, inference_pb2.TokenText] = {}
        generation = Generation(step, self._services, account, self._deadline)
        async with contextlib.aclosing(generation.responses()) as responses:
            async for response in responses:
                if response.HasField("error"):
                    raise from_proto(response.error)
                if response.delta.tokens:
                    given[response.delta.choice] = response.delta.tokens[0]
        if account is not self._account:
            self._account.attempts += account.attempts - 1
        return [self._offered(given[i]) for i in range(step.n)]

    def _step(self, length: int) -> ValidRequest:
        request, live = self._request, self._beams.live
        sampling = common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=length + 1, ignore_eos=True)
        sampling.logprobs = max(2 * request.n, request.sampling.logprobs)
        prior = tuple(tuple(beam.ids) for beam in live) if length else ()
        return replace(request, sampling=sampling, n=len(live), prior=prior, is_step=True)

    def _account_of_step(self, length: int) -> Account:
        """The first step's is that of the whole: it says how the prompt was computed, and by whom."""
        mine = self._account
        return Account(mine.request_id, mine.prompt_tokens, mine.slot, mine.span) if length else mine

    def _offered(self, token: inference_pb2.TokenText) -> list[common_pb2.SampledToken]:
        """Of a step's token, those that were likeliest in its place, as the client may be told of them."""
        top = [common_pb2.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top]
        told = top[: self._request.sampling.logprobs]
        return [
            common_pb2.SampledToken(token_id=t.token_id, logprob=t.logprob, top=told)
            for t in top[: 2 * self._request.n]
        ]

    def _told(self, index: int, beam: Beam) -> Iterator[inference_pb2.Delta]:
        """A beam as a choice, in messages of bounded size."""
        if self._request.echo_text is not None:
            yield inference_pb2.Delta(choice=index, text=self._request.echo_text)
        choice = Choice(index, self._request, self._services.tokenizer)
        for begin in range(0, len(beam.tokens), _TOKENS_PER_MESSAGE):
            if delta := choice.take(beam.tokens[begin : begin + _TOKENS_PER_MESSAGE]):
                yield delta
        reason = common_pb2.FINISH_REASON_LENGTH if beam.ended_by is None else common_pb2.FINISH_REASON_STOP
        end = choice.take((), reason, beam.ended_by)
        assert end is not None
        self._services.metrics.count_finished(reason)
        self.answer_tokens.append(len(choice.ids))
        yield end
