"""DecodeService: reserve, wait for the KV (or compute the prompt here), stream tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import structlog
from pagewire.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from pagewire_core.errors import Cancelled, InvalidRequest, Unavailable
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, Finished, Started, Token
from pagewire_engine.metrics import StageMetrics
from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from pagewire_engine.wire import from_proto, to_proto

from pagewire_decode.transfers import Transfers

log = structlog.get_logger(__name__)


@dataclass
class _Call:
    """One Decode call: the engine's request and what has come of it so far."""

    request: decode_pb2.DecodeRequest
    work: Request
    events: asyncio.Queue[Event]
    cached_tokens: int = 0
    started_at: float | None = None
    first_at: float = 0.0
    first: list[Sampled] = field(default_factory=list)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """One Decode call is one request; leaving the call in any way gives everything back."""

    def __init__(
        self, engine: Engine, transfers: Transfers, stages: StageMetrics, instance: str, kv_address: str
    ) -> None:
        self._engine, self._transfers, self._stages = engine, transfers, stages
        self._instance, self._kv_address = instance, kv_address
        self._calls: dict[bytes, _Call] = {}
        self.draining = False  # new requests are refused, running ones go on

    @property
    def num_calls(self) -> int:
        """Requests that are decoding or wait for their KV."""
        return len(self._calls) + len(self._transfers)

    def _check_not_draining(self) -> None:
        if self.draining:
            raise Unavailable("this decode worker is shutting down")

    async def Reserve(
        self, request: decode_pb2.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> decode_pb2.ReserveResponse:
        self._check_not_draining()
        if len(request.transfer_id) != 16:
            raise InvalidRequest("transfer_id must be 16 bytes")
        transfer = self._transfers.reserve(
            request.transfer_id, list(request.prompt_ids), request.cache_root, max(request.n, 1)
        )
        return decode_pb2.ReserveResponse(
            local_tokens=transfer.local_tokens, instance=self._instance, kv_address=self._kv_address
        )

    async def Stop(self, request: decode_pb2.StopRequest, context: grpc.aio.ServicerContext) -> decode_pb2.StopResponse:
        call = self._calls.get(request.transfer_id)
        if request.choices:
            if call:
                self._engine.cancel(call.work, list(request.choices))
            return decode_pb2.StopResponse(found=call is not None)
        found = self._transfers.end(request.transfer_id, Cancelled("stopped by the router"))
        if call:
            self._engine.cancel(call.work)
            call.events.put_nowait(Failed(Cancelled("stopped by the router")))
        return decode_pb2.StopResponse(found=found or call is not None)

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        if len(request.transfer_id) != 16:
            raise InvalidRequest("transfer_id must be 16 bytes")
        events: asyncio.Queue[Event] = asyncio.Queue()
        params = SamplingParams.from_proto(request.sampling)
        work = Request(request.request_id, list(request.prompt_ids), request.cache_root, params,
                       max(request.n, 1), events.put_nowait)  # fmt: skip
        call = _Call(request, work, events)
        started = await self._start(call)
        self._calls[request.transfer_id] = call
        try:
            async for response in self._responses(call, started):
                yield response
        finally:
            del self._calls[request.transfer_id]
            self._engine.cancel(work)

    async def _start(self, call: _Call) -> decode_pb2.DecodeStarted:
        """Puts the request into the engine; what is known of its prompt's KV by then."""
        request = call.request
        if request.local_prefill:
            self._check_not_draining()
            self._engine.submit(call.work)
            return decode_pb2.DecodeStarted()
        transfer = self._transfers.claim(request.transfer_id)
        try:
            received, first = await transfer.ready
        except BaseException:
            self._transfers.end(request.transfer_id, Cancelled("the decode call ended"))
            raise
        block_table = self._transfers.take(transfer)
        call.cached_tokens, call.started_at = transfer.local_tokens, time.monotonic()
        with_logprob = call.work.params.logprobs is not None
        self._engine.start_transferred(call.work, block_table, [from_proto(t, with_logprob) for t in first])
        return decode_pb2.DecodeStarted(
            received_tokens=received.tokens, received_bytes=received.bytes, lane=received.lane
        )

    async def _responses(
        self, call: _Call, known: decode_pb2.DecodeStarted
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """`known`: what DecodeStarted will say beside the first tokens."""
        started = False
        finished: Finished | None = None
        while finished is None:
            events = [await call.events.get()]
            while not call.events.empty():
                events.append(call.events.get_nowait())
            choices: dict[int, common_pb2.ChoiceTokens] = {}
            for event in events:
                match event:
                    case Failed(error):
                        raise error
                    case Started(cached_tokens):
                        call.cached_tokens, call.started_at = cached_tokens, time.monotonic()
                    case Finished():
                        finished = event
                    case Token():
                        self._add_token(call, event, choices)
            if not started and len(call.first) == call.work.n:
                yield decode_pb2.DecodeResponse(started=self._started(call, known))
                started = True
            if started and choices:
                yield decode_pb2.DecodeResponse(tokens=decode_pb2.DecodeTokens(choices=choices.values()))
        yield decode_pb2.DecodeResponse(finished=self._finished(call, finished))

    def _add_token(self, call: _Call, token: Token, choices: dict[int, common_pb2.ChoiceTokens]) -> None:
        """First tokens go into DecodeStarted, all others (and every end) into DecodeTokens."""
        first = len(call.first) < call.work.n and token.choice == len(call.first)
        if first and token.finish_reason is None:
            call.first.append(token.sampled)
            return
        message = choices.setdefault(token.choice, common_pb2.ChoiceTokens(choice=token.choice))
        if first:
            call.first.append(token.sampled)
        else:
            message.tokens.append(to_proto(token.sampled))
        if token.finish_reason is not None:
            message.finish_reason = token.finish_reason
            if token.stop_token_id is not None:
                message.stop_token_id = token.stop_token_id

    def _started(self, call: _Call, started: decode_pb2.DecodeStarted) -> decode_pb2.DecodeStarted:
        call.first_at = time.monotonic()
        started.first_tokens.extend(to_proto(sampled) for sampled in call.first)
        started.cached_tokens = call.cached_tokens
        if call.request.local_prefill:
            started.computed_tokens = len(call.work.prompt) - call.cached_tokens
        return started

    def _finished(self, call: _Call, finished: Finished) -> decode_pb2.DecodeFinished:
        now = time.monotonic()
        began = call.started_at or call.first_at
        timings = common_pb2.StageTimings(decode_us=int((now - call.first_at) * 1e6))
        if call.request.local_prefill:
            timings.queue_us = int((began - call.work.arrived) * 1e6)
            timings.prefill_us = int((call.first_at - began) * 1e6)
            self._stages.observe(queue=began - call.work.arrived, prefill=call.first_at - began)
        self._stages.observe(decode=now - call.first_at)
        log.info("decode done", request_id=call.request.request_id, prompt_tokens=len(call.work.prompt),
                 local_prefill=call.request.local_prefill, decode_ms=timings.decode_us / 1e3,
                 preemptions=finished.num_preemptions)  # fmt: skip
        return decode_pb2.DecodeFinished(timings=timings, num_preemptions=finished.num_preemptions)
