"""DecodeService: reserve, wait for the KV (or compute the prompt here), stream tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import grpc
from pagewire.v1 import decode_pb2, decode_pb2_grpc
from pagewire_core import faults, tracing
from pagewire_core.errors import Cancelled, InvalidRequest, Overloaded, Unavailable
from pagewire_core.feed import Feeds
from pagewire_engine.constraint import Constraints, matchings_of
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed
from pagewire_engine.metrics import StageMetrics
from pagewire_engine.prefix_fetch import Fetch, fetch_nothing
from pagewire_engine.wire import from_proto
from pagewire_transfer.loss import transferring

from pagewire_decode.call import Call
from pagewire_decode.transfers import Transfers

_SPAN = "pagewire.v1.DecodeService/Decode"
_REFUSED = "this worker takes no requests to decode now"
_HANDED_OVER = "this worker stops to decode"


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """One Decode call is one request; leaving the call in any way gives everything back."""

    def __init__(
        self,
        engine: Engine,
        transfers: Transfers,
        stages: StageMetrics,
        instance: str,
        kv_address: str,
        constraints: Constraints | None = None,
        fetch: Fetch = fetch_nothing,
    ) -> None:
        self._engine, self._transfers, self._stages, self._constraints = engine, transfers, stages, constraints
        self._instance, self._kv_address, self._fetch = instance, kv_address, fetch
        self._calls: dict[bytes, Call] = {}
        self._feeds = Feeds(decode_pb2.FeedResponse)
        self.refusing = False  # new requests, as if there were no room for them; running ones go on
        self.taking_one_token = False  # though refusing, requests for one token whose prompt is to be computed here

    @property
    def num_calls(self) -> int:
        """Requests that are decoding or wait for their KV."""
        return len(self._calls) + len(self._transfers)

    def _check_not_refusing(self) -> None:
        if self.refusing:
            raise Overloaded(_REFUSED)

    def hand_over(self) -> None:
        """Ends what still runs; its router goes on with it elsewhere."""
        for call in self._calls.values():
            call.take(Failed(Unavailable(_HANDED_OVER)))
        self._transfers.end_all(Unavailable(_HANDED_OVER))

    async def Reserve(
        self, request: decode_pb2.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> decode_pb2.ReserveResponse:
        self._check_not_refusing()
        if len(request.transfer_id) != 16:
            raise InvalidRequest("transfer_id must be 16 bytes")
        faults.point("reserve")
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
            call.take(Failed(Cancelled("stopped by the router")))
        return decode_pb2.StopResponse(found=found or call is not None)

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        if len(request.transfer_id) != 16:
            raise InvalidRequest("transfer_id must be 16 bytes")
        feed = self._feeds.get(request.feed_id)
        call = Call(request, feed)
        with contextlib.ExitStack() as held:
            span = held.enter_context(tracing.begin(_SPAN, {"gen_ai.request.id": request.request_id}))
            if feed:
                held.enter_context(feed.used())
            fetched = await self._fetch(request.prompt_ids, request.cache_root, request.holder)
            call.known.fetched.CopyFrom(fetched)
            held.callback(call.describe, span)
            await self._start(call)
            self._calls[request.transfer_id] = call
            try:
                async for response in call.responses(self._stages):
                    yield response
            finally:
                faults.point("release")
                del self._calls[request.transfer_id]
                self._engine.cancel(call.work)

    async def Feed(
        self, request: decode_pb2.FeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FeedResponse]:
        async with contextlib.aclosing(self._feeds.serve(request.feed_id)) as batches:
            async for batch in batches:
                yield batch

    def _check_prior(self, request: decode_pb2.DecodeRequest) -> None:
        if len(request.prior) != max(request.n, 1) or all(output.ended for output in request.prior):
            raise InvalidRequest("prior must have an entry for each choice, and one that has not ended")
        longest = max(len(output.token_ids) for output in request.prior if not output.ended)
        self._engine.check_fits(len(request.prompt_ids) + longest, len(request.prior))
        for output in request.prior:
            self._engine.check_ids(output.token_ids)

    async def _start(self, call: Call) -> None:
        """Puts the request into the engine, once its prompt's KV is here."""
        request = call.request
        if request.local_prefill:
            await self._prepare(call)
            if not (self.taking_one_token and request.sampling.max_tokens == 1):
                self._check_not_refusing()
            if request.transfer_id in self._calls:
                raise InvalidRequest("this transfer already has its Decode call")
            self._transfers.renounce(call.work)
            if request.prior:
                self._engine.resume(call.work, call.prior)
            else:
                self._engine.submit(call.work)
            return
        transfer = self._transfers.claim(request.transfer_id)
        try:
            if not transfer.is_for(call.work):
                raise InvalidRequest("this is not what the reservation was made for")
            await self._prepare(call)  # may take longer than a lease
            with transferring():
                received, first = await transfer.ready
        except BaseException:
            self._transfers.end(request.transfer_id, Cancelled("the decode call ended"))
            raise
        block_table = self._transfers.take(transfer)
        call.cached_tokens, call.started_at = transfer.local_tokens, time.monotonic()
        with_logprob = call.work.params.logprobs is not None
        call.known = decode_pb2.DecodeStarted(
            received_tokens=received.tokens, received_bytes=received.bytes, lane=received.lane
        )
        if request.prior:
            self._engine.resume(call.work, call.prior, block_table)
            return
        self._engine.start_transferred(call.work, block_table, [from_proto(t, with_logprob) for t in first])

    async def _prepare(self, call: Call) -> None:
        """Refuses what could not be resumed, and makes the grammar that the output follows."""
        request = call.request
        if request.prior:
            self._check_prior(request)
        call.work.matchings = await matchings_of(self._constraints, request.sampling, request.cache_root, call.prior)
