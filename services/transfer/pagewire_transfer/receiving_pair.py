"""The decode side of one pair: a control stream, a lane, and the transfers that share them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import structlog
import torch
from google.protobuf.message import DecodeError, Message
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core import faults, tracing
from pagewire_core.errors import (
    Cancelled,
    Incompatible,
    Internal,
    InvalidRequest,
    PagewireError,
    Unavailable,
    from_proto,
)

from pagewire_transfer.group_lanes import DECODE_RANK
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.landing import Landing, ReceiveSettings
from pagewire_transfer.lane_thread import LaneThread
from pagewire_transfer.sink import ReceiveStats
from pagewire_transfer.wire import MAX_CHUNK_BYTES, from_bytes

log = structlog.get_logger(__name__)

# Far more than a peer that keeps to the rules ever needs.
_MAX_UNREAD = 16_384  # messages
_MAX_OPEN = 8192  # transfers

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class ReceivingPair:
    """Serves one Connect call. A transfer's failure ends the transfer; a peer that breaks the rules of the
    stream, or a broken lane, ends the pair and every transfer on it.

    owners: transfer id -> pair, of all open transfers of the servicer.
    """

    def __init__(
        self, settings: ReceiveSettings, hello: kv.Hello, lane: str, owners: dict[bytes, ReceivingPair], spawn: Spawn
    ) -> None:
        self._settings = settings
        self._peer = hello.worker_id
        self._lane_name = lane
        self._owners = owners
        self._spawn = spawn
        self._was_offered = False  # any transfer
        self._open: dict[bytes, Incoming | None] = {}  # None: offered, pages not bound yet
        self._spans: dict[bytes, tracing.Span] = {}  # of transfers that are not yet counted
        # A peer that announces faster than the lane delivers is held back by the stream's flow control.
        self._room = asyncio.Semaphore(settings.window)
        self._coming: deque[Landing] = deque()  # in the order of the lane
        self._lane_is_open = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[kv.ConnectResponse | PagewireError | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = LaneThread(self._put, settings.timeout_s)
        self._closed = False
        settings.metrics.pairs.inc()

    @property
    def is_idle(self) -> bool:
        """Receives nothing and is not about to: a peer makes a pair for an offer, sent when the lane is open."""
        return self._was_offered and not self._open

    def start(self, requests: AsyncIterator[kv.ConnectRequest], epoch: int) -> None:
        self._tasks = [self._spawn(self._guard(work)) for work in (self._read(requests), self._open_lane(epoch))]

    async def responses(self) -> AsyncIterator[kv.ConnectResponse]:
        """What is to be sent to the peer, until the pair ends; raises what ended it."""
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, PagewireError):
                raise item
            yield item

    def _put(self, key: str, value: bytes) -> None:
        self._send(store_put=kv.StorePut(key=key, value=value))

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """A failure in any of the pair's tasks ends its stream."""
        try:
            await work
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Ends the pair at once: a peer that reads nothing may never hear why."""
        if isinstance(error, DecodeError):
            error = Incompatible("the peer sent bytes that are no message")
        if not isinstance(error, PagewireError):  # a bug, here or in the sink: fails this pair, not the process
            log.error("kv pair failed", peer=self._peer, exc_info=error)
            error = Internal(f"receiving KV failed: {type(error).__name__}")
        self.close(error)

    async def _read(self, requests: AsyncIterator[kv.ConnectRequest]) -> None:
        async for request in requests:
            if self._outbox.qsize() > _MAX_UNREAD:
                raise Incompatible("the peer reads nothing of what it is told")
            kind = request.WhichOneof("message")
            if kind == "store_put":
                self._thread.store.receive(request.store_put.key, request.store_put.value)
            elif kind == "offer":
                self._offered(request.offer)
            elif kind == "chunk":
                await self._announced(request.chunk)
            elif kind == "sealed":
                self._sealed(request.sealed)
            elif kind == "abort":
                self._end(request.abort.transfer_id, from_proto(request.abort.error))
            else:
                raise Incompatible(f"{kind or 'an empty message'} is out of turn")
        self._outbox.put_nowait(None)

    def _offered(self, offer: kv.Offer) -> None:
        transfer_id = offer.transfer_id
        if len(transfer_id) != 16 or offer.token_begin > offer.token_end or transfer_id in self._open:
            raise Incompatible("an offer names a bad transfer id or range, or a transfer that is open")
        if len(self._open) >= _MAX_OPEN:
            raise Incompatible(f"more than {_MAX_OPEN} transfers at once")
        if transfer_id in self._owners:
            self._tell(transfer_id, InvalidRequest("another prefill worker has this transfer open"))
            return
        self._was_offered = True
        self._open[transfer_id] = None
        self._owners[transfer_id] = self
        said = offer.trace
        caller = tracing.received(((tracing.PARENT_KEY, said.traceparent), (tracing.STATE_KEY, said.tracestate)))
        if caller.headers:
            self._spans[transfer_id] = caller.child("receive", {"pagewire.peer": self._peer}, "server")
        self._spawn(self._guard(self._bind(offer)))

    async def _bind(self, offer: kv.Offer) -> None:
        transfer_id, tokens = offer.transfer_id, (offer.token_begin, offer.token_end)
        settings = self._settings
        try:
            await settings.sink.bind(transfer_id, *tokens)
        except PagewireError as error:
            self.abort(transfer_id, error)
            return
        if self._open.get(transfer_id, self) is not None:
            settings.sink.failed(transfer_id, Cancelled("the transfer ended before its pages were bound"))
            return
        self._open[transfer_id] = Incoming(settings.identity.layout, tokens, settings.window)
        self._send(grant=kv.Grant(transfer_id=transfer_id, window=settings.window))

    async def _announced(self, chunk: kv.Chunk) -> None:
        if not 0 < chunk.num_bytes <= MAX_CHUNK_BYTES:
            raise Incompatible(f"a chunk of {chunk.num_bytes} bytes; the limit is {MAX_CHUNK_BYTES}")
        landing = Landing(chunk)
        if chunk.transfer_id in self._open:
            # After an announcement against the rules nobody knows what comes over the lane: that ends the pair.
            landing.incoming = self._open[chunk.transfer_id]
            if landing.incoming is None:
                raise Incompatible("a chunk came before its grant")
            landing.part = landing.incoming.announce(chunk)
        await self._lane_is_open.wait()
        await self._room.acquire()
        self._receive(landing)

    async def _open_lane(self, epoch: int) -> None:
        host = self._settings.identity.host
        await asyncio.wrap_future(self._thread.open(self._lane_name, DECODE_RANK, host, epoch))
        self._lane_is_open.set()

    def _receive(self, landing: Landing) -> None:
        """Takes the chunk off the lane, wanted or not: the lane knows only order."""
        self._coming.append(landing)
        self._thread.submit(self._land).add_done_callback(
            lambda job: self._loop.call_soon_threadsafe(self._landed, landing, job)
        )

    def _land(self) -> bool:
        """On the lane thread. Whether the bytes, as the sink copied them, are those that were announced."""
        landing = self._coming.popleft()
        next_bytes = self._coming[0].chunk.num_bytes if self._coming else 0
        self._settings.staging.take()
        try:
            with self._thread.lane.recv(landing.chunk.num_bytes, landing.chunk.data, next_bytes) as wire:
                if faults.point("chunk-received") == "flip":
                    wire[wire.numel() // 2] ^= 1
                return self._scatter_and_verify(landing, wire)
        finally:
            self._settings.staging.give_back()

    def _scatter_and_verify(self, landing: Landing, wire: torch.Tensor) -> bool:
        settings, chunk, part = self._settings, landing.chunk, landing.part
        if part is None or not self._wanted(landing):
            return True
        try:
            shaped = from_bytes(settings.identity.layout, part, wire)
            return settings.sink.scatter(chunk.transfer_id, part.layers, part.tokens, shaped) == chunk.checksum
        except Cancelled as error:
            landing.refused = error
            return True

    def _landed(self, landing: Landing, job: Future[bool]) -> None:
        self._room.release()
        error = job.exception()
        if isinstance(error, Exception):
            self._break(error)
            return
        self._settings.metrics.bytes.labels(direction="received", lane=self._lane_name).inc(landing.chunk.num_bytes)
        if self._wanted(landing):
            self._acknowledge(landing, job.result())

    def _wanted(self, landing: Landing) -> bool:
        return landing.part is not None and self._open.get(landing.chunk.transfer_id) is landing.incoming

    def _acknowledge(self, landing: Landing, intact: bool) -> None:
        transfer_id, seq, incoming = landing.chunk.transfer_id, landing.chunk.seq, landing.incoming
        assert incoming is not None
        if landing.refused is not None:
            self._fail(transfer_id, landing.refused)
            return
        if intact:
            incoming.verified(seq)
        else:
            self._settings.metrics.checksum_failures.inc()
            try:
                incoming.damaged(seq)
            except Unavailable as error:
                self._fail(transfer_id, error)
                return
        self._send(chunk_ack=kv.ChunkAck(transfer_id=transfer_id, seq=seq, resend=not intact))

    def _sealed(self, sealed: kv.Sealed) -> None:
        if sealed.transfer_id not in self._open:
            return  # crossed our own Abort on its way
        faults.point("sealed")
        incoming = self._open[sealed.transfer_id]
        try:
            if incoming is None:
                raise Incompatible("a seal came before its grant")
            incoming.seal(sealed.num_chunks, sealed.root_checksum)
        except PagewireError as error:
            self._fail(sealed.transfer_id, error)
            return
        # Everything is here: from now on the end of the pair is no failure of this transfer.
        self._forget(sealed.transfer_id)
        self._spawn(self._guard(self._deliver(sealed, incoming)))

    async def _deliver(self, sealed: kv.Sealed, incoming: Incoming) -> None:
        stats = ReceiveStats(incoming.bytes, incoming.chunks, incoming.num_tokens, self._lane_name)
        try:
            await self._settings.sink.sealed(sealed.transfer_id, stats, sealed.first_tokens)
        except PagewireError as error:
            self._count(sealed.transfer_id, error)
            self._tell(sealed.transfer_id, error)
            return
        self._spans.get(sealed.transfer_id, tracing.NOWHERE).set({
            "pagewire.transferred_tokens": stats.tokens, "pagewire.transferred_bytes": stats.bytes,
            "pagewire.lane": stats.lane, "pagewire.chunks": stats.chunks,
        })  # fmt: skip
        self._count(sealed.transfer_id, None)
        self._send(sealed_ack=kv.SealedAck(transfer_id=sealed.transfer_id))

    def abort(self, transfer_id: bytes, error: PagewireError) -> None:
        """Our side ends a transfer: tells the peer, not the sink. Idempotent."""
        if self._forget(transfer_id):
            self._count(transfer_id, error)
            self._tell(transfer_id, error)

    def _fail(self, transfer_id: bytes, error: PagewireError) -> None:
        self._tell(transfer_id, error)
        self._end(transfer_id, error)

    def _end(self, transfer_id: bytes, error: PagewireError) -> None:
        """The transfer has ended by no doing of the sink, which is told."""
        if self._forget(transfer_id):
            self._count(transfer_id, error)
            self._settings.sink.failed(transfer_id, error)

    def _forget(self, transfer_id: bytes) -> bool:
        if transfer_id not in self._open:
            return False
        del self._open[transfer_id], self._owners[transfer_id]
        return True

    def _count(self, transfer_id: bytes, error: PagewireError | None) -> None:
        span = self._spans.pop(transfer_id, tracing.NOWHERE)
        if error:
            span.fail(error)
        span.end()
        outcome = type(error).__name__ if error else "ok"
        self._settings.metrics.transfers.labels(direction="received", outcome=outcome).inc()

    def _tell(self, transfer_id: bytes, error: PagewireError) -> None:
        self._send(abort=kv.Abort(transfer_id=transfer_id, error=error.to_proto()))

    def _send(self, **message: Message) -> None:
        self._outbox.put_nowait(kv.ConnectResponse(**message))

    def close(self, error: PagewireError) -> None:
        """Ends the pair and every transfer on it. Never waits; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._outbox.put_nowait(error)
        for transfer_id in list(self._open):
            self._end(transfer_id, error)
        for task in self._tasks:
            task.cancel()
        self._thread.close()
        self._settings.metrics.pairs.dec()
        log.info("kv pair down", peer=self._peer, error=error.message)

    async def closed(self) -> None:
        """Returns when the pair's thread has nothing to do any more. After `close`."""
        await self._thread.closed()
