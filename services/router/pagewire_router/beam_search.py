"""The life of one admitted beam search: rounds of requests for one token each, then the best beams as choices.

A step is a Generation like any other: placed, retried and booked by itself, and cheap because workers have all but its
last tokens in their prefix caches. So whatever may befall a worker, the answer is the same. The search holds one place
of the queue, for n sequences, which are the steps that it has at once.
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
from pagewire_router.together import together

_TOKENS_PER_MESSAGE = 256


class BeamSearch:
    """As Generation. Nothing is told before the search is over, so a failure is always raised."""

    def __init__(
        self,
        request: ValidRequest,
        services: Services,
        account: Account,
        deadline: float,
    ) -> None:
        assert request.length_penalty is not None
        sampling = request.sampling
        self._request, self._services, self._account, self._deadline = request, services, account, deadline
        self._step = replace(request, sampling=_sampling_of_step(request), n=1, is_step=True)
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
        for step in range(beams.max_tokens):
            accounts = [self._account_of_step(step) for _ in beams.live]
            offered = await together(map(self._next, beams.live, accounts))
            for index in range(len(offered)):
                self._account.note_tokens(index, 1, self._services.metrics)
            self._account.attempts += sum(account.attempts - 1 for account in accounts if account is not self._account)
            beams.advance(offered)
            if beams.settled:
                return

    def _account_of_step(self, step: int) -> Account:
        """The first step's is that of the whole: it says how the prompt was computed, and by whom."""
        mine = self._account
        return Account(mine.request_id, mine.prompt_tokens + step, mine.slot, mine.span) if step else mine

    async def _next(self, beam: Beam, account: Account) -> list[common_pb2.SampledToken]:
        """The likeliest tokens after a beam, best first, as the client may be told of them. Raises PagewireError."""
        request = replace(self._step, prompt_ids=[*self._request.prompt_ids, *beam.ids])
        token = inference_pb2.TokenText()
        generation = Generation(request, self._services, account, self._deadline)
        async with contextlib.aclosing(generation.responses()) as responses:
            async for response in responses:
                if response.HasField("error"):
                    raise from_proto(response.error)
                if response.delta.tokens:
                    token = response.delta.tokens[0]
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


def _sampling_of_step(request: ValidRequest) -> common_pb2.SamplingParams:
    logprobs = max(2 * request.n, request.sampling.logprobs)
    return common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=1, ignore_eos=True, logprobs=logprobs)
