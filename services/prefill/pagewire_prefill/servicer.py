"""PrefillService: compute a prompt, give its first tokens at once, push its KV to the decode worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import structlog
from pagewire.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from pagewire_core import faults, tracing
from pagewire_core.errors import Cancelled, InvalidRequest, Overloaded, Unavailable
from pagewire_engine.constraint import Constraints, matchings_of
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, FirstTokens, Progress, PromptScores, Started
from pagewire_engine.metrics import StageMetrics
from pagewire_engine.prefix_fetch import Fetch, fetch_nothing
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from pagewire_engine.wire import scores_to_proto, to_proto
from pagewire_transfer.loss import transferring
from pagewire_transfer.sender import KvSender, Outgoing, SendStats

from pagewire_prefill.source import PromptSource

log = structlog.get_logger(__name__)


_SPAN, _EMBED_SPAN = "pagewire.v1.PrefillService/Prefill", "pagewire.v1.PrefillService/Embed"
_REFUSED = "this worker computes no prompts for others now"
_HANDED_OVER = "this worker stops to compute prompts for others"


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One call is one prompt; leaving the call in any way gives everything back."""

    def __init__(
        self,
        engine: Engine,
        source: PromptSource,
        sender: KvSender,
        stages: StageMetrics,
        constraints: Constraints | None = None,
        fetch: Fetch = fetch_nothing,
    ) -> None:
        self._engine, self._source, self._sender, self._stages = engine, source, sender, stages
        self._constraints, self._fetch = constraints, fetch
        self._cleanups: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Queue[Event]] = set()  # the events of each call
        self.refusing = False  # new calls, as if there were no room for them; running ones go on

    def _check_not_refusing(self) -> None:
        if self.refusing:
            raise Overloaded(_REFUSED)

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        self._check_not_refusing()
        if len(request.transfer_id) != 16 or not request.decode_address:
            raise InvalidRequest("transfer_id (16 bytes) and decode_address are required")
        if request.decode_local_tokens > len(request.prompt_ids):
            raise InvalidRequest("decode_local_tokens are more than the prompt has")
        with tracing.begin(_SPAN, {"gen_ai.request.id": request.request_id}) as span:
            fetched = await self._fetch(request.prompt_ids, request.cache_root, request.holder)
            async with contextlib.aclosing(self._responses(request, fetched, span)) as responses:
                async for response in responses:
                    yield response

    async def _responses(
        self, request: prefill_pb2.PrefillRequest, fetched: common_pb2.Fetched, span: tracing.Span
    ) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        faults.point("queue")
        matchings = await matchings_of(self._constraints, request.sampling, request.cache_root)
        events: asyncio.Queue[Event] = asyncio.Queue()
        work = Request(
            request.request_id,
            list(request.prompt_ids),
            request.cache_root,
            SamplingParams.from_proto(request.sampling),
            max(request.n, 1),
            events.put_nowait,
            prefill_only=True,
            matchings=matchings,
            prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
        )
        self._check_not_refusing()  # what waited until now is none of the calls that a drain waits for
        if request.transfer_id in self._source:  # one prompt's blocks would be sent for the other's
            raise InvalidRequest("this transfer id is in use")
        self._engine.submit(work)
        self._running.add(events)
        self._source.add(request.transfer_id, work)
        opening: asyncio.Task[Outgoing] | None = None
        stage = span.child("queue")
        try:
            started = await _until_started(events)
            started_at = time.monotonic()
            stage.end(started_at)
            num_tokens = len(work.prompt)
            stage = span.child("prefill", {
                "gen_ai.usage.prompt_tokens": num_tokens, "pagewire.cached_tokens": started.cached_tokens,
                "pagewire.computed_tokens": num_tokens - started.cached_tokens,
            }, started=started_at)  # fmt: skip
            told = prefill_pb2.PrefillStarted(cached_tokens=started.cached_tokens, fetched=fetched)
            yield prefill_pb2.PrefillResponse(started=told)
            # Pages are bound on the decode side only now that the prompt is being computed.
            opening = asyncio.create_task(self._open(request))
            scores: list[PromptScores] = []
            first = await self._until_first_tokens(events, opening, Progress(started.cached_tokens), scores)
            first_at = time.monotonic()
            stage.end(first_at)
            for part in scores:
                yield prefill_pb2.PrefillResponse(prompt_logprobs=scores_to_proto(part))
            faults.point("first-token")
            tokens = [to_proto(sampled) for sampled in first.tokens]
            yield prefill_pb2.PrefillResponse(first_tokens=prefill_pb2.FirstTokens(tokens=tokens))
            with transferring():
                outgoing = await opening
                stats = await outgoing.seal(tokens)
            yield self._kv_sent(request, stats, work.arrived, started_at, first_at)
        finally:
            stage.end()
            self._running.discard(events)
            cleanup = asyncio.create_task(self._clean_up(request.transfer_id, work, opening))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)

    async def Embed(
        self, request: prefill_pb2.EmbedPromptRequest, context: grpc.aio.ServicerContext
    ) -> prefill_pb2.EmbedPromptResponse:
        self._check_not_refusing()
        with tracing.begin(_EMBED_SPAN, {"gen_ai.request.id": request.request_id}):
            return await self._embed(request)

    async def _embed(self, request: prefill_pb2.EmbedPromptRequest) -> prefill_pb2.EmbedPromptResponse:
        events: asyncio.Queue[Event] = asyncio.Queue()
        work = Request(
            request.request_id,
            list(request.prompt_ids),
            request.cache_root,
            SamplingParams(temperature=0.0, embeds=True),
            1,
            events.put_nowait,
            prefill_only=True,
        )
        self._engine.submit(work)
        self._running.add(events)
        try:
            started = await _until_started(events)
            while isinstance(event := await events.get(), Progress):
                pass
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, FirstTokens)
            hidden = event.tokens[0].hidden
            assert hidden is not None
            vector = hidden / hidden.norm().clamp_min(1e-12)
            return prefill_pb2.EmbedPromptResponse(vector=vector.tolist(), cached_tokens=started.cached_tokens)
        finally:
            self._running.discard(events)
            self._engine.cancel(work)

    async def _open(self, request: prefill_pb2.PrefillRequest) -> Outgoing:
        tokens = (request.decode_local_tokens, len(request.prompt_ids))
        return await self._sender.open(request.transfer_id, request.decode_address, request.decode_instance, tokens)

    async def _until_first_tokens(
        self,
        events: asyncio.Queue[Event],
        opening: asyncio.Task[Outgoing],
        progress: Progress,
        scores: list[PromptScores],
    ) -> FirstTokens:
        """Passes progress on to the transfer as it happens; raises what the transfer raises. Fills `scores`."""
        getting: asyncio.Task[Event] | None = None
        try:
            while True:
                if opening.done():
                    with transferring():
                        opening.result().extend(progress.num_computed, progress.ahead)
                getting = getting or asyncio.create_task(events.get())
                waiting = {getting} if opening.done() else {getting, opening}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    continue
                event, getting = getting.result(), None
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, FirstTokens):
                    return event
                if isinstance(event, PromptScores):
                    scores.append(event)
                    continue
                assert isinstance(event, Progress)
                progress = event
        finally:
            if getting:
                getting.cancel()

    def _kv_sent(
        self, request: prefill_pb2.PrefillRequest, stats: SendStats, arrived: float, started: float, first: float
    ) -> prefill_pb2.PrefillResponse:
        now = time.monotonic()
        timings = common_pb2.StageTimings(
            queue_us=_us(started - arrived),
            prefill_us=_us(first - started),
            transfer_us=stats.transfer_us,
            kv_tail_us=_us(now - first),
        )
        num_tokens = len(request.prompt_ids) - request.decode_local_tokens
        self._stages.observe(queue=started - arrived, prefill=first - started, kv_tail=now - first)
        log.info("prefill done", request_id=request.request_id, prompt_tokens=len(request.prompt_ids),
                 transferred_tokens=num_tokens, transferred_bytes=stats.bytes, lane=stats.lane,
                 queue_ms=timings.queue_us / 1e3, prefill_ms=timings.prefill_us / 1e3,
                 transfer_ms=timings.transfer_us / 1e3, kv_tail_ms=timings.kv_tail_us / 1e3,
                 kv_overlap=round(stats.overlap, 3), resent_chunks=stats.resent)  # fmt: skip
        return prefill_pb2.PrefillResponse(
            kv_sent=prefill_pb2.KvSent(
                transferred_tokens=num_tokens,
                transferred_bytes=stats.bytes,
                lane=stats.lane,
                timings=timings,
                wire_us=stats.wire_us,
                overlap=stats.overlap,
                resent_chunks=stats.resent,
            )
        )

    async def _clean_up(self, transfer_id: bytes, work: Request, opening: asyncio.Task[Outgoing] | None) -> None:
        """Blocks go back only when no lane thread can read them any more."""
        if opening is not None:
            opening.cancel()
            [outgoing] = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(outgoing, Outgoing):
                outgoing.abort(Cancelled("the prefill call ended"))  # no effect on a sealed transfer
                await outgoing.closed()
        faults.point("release")
        self._source.discard(transfer_id)
        self._engine.cancel(work)

    def hand_over(self) -> None:
        """Ends prompts that are not yet computed; their router has them computed elsewhere."""
        for events in self._running:
            events.put_nowait(Failed(Unavailable(_HANDED_OVER)))

    @property
    def num_calls(self) -> int:
        """Prompts in work, those that are being given back included."""
        return len(self._running) + len(self._cleanups)


async def _until_started(events: asyncio.Queue[Event]) -> Started:
    event = await events.get()
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Started), event
    return event


def _us(seconds: float) -> int:
    return int(seconds * 1e6)
