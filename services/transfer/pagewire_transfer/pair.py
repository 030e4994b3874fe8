"""The prefill side of one pair: a control stream, a lane, and the transfers that share them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.common_pb2 import TraceContext
from pagewire_core import faults
from pagewire_core.errors import (
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    Internal,
    PagewireError,
    Unavailable,
    from_proto,
)
from pagewire_core.tls import TlsFiles
from pagewire_core.tracing import Span

from pagewire_transfer.chunking import ChunkPlan
from pagewire_transfer.control_stream import ControlStream
from pagewire_transfer.group_lanes import PREFILL_RANK
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.lane_thread import LaneThread
from pagewire_transfer.metrics import StagingSlots, TransferMetrics
from pagewire_transfer.outgoing import Outgoing
from pagewire_transfer.source import KvSource
from pagewire_transfer.wire import ChunkRange, chunk_bytes, from_bytes

log = structlog.get_logger(__name__)

_OPEN_TIMEOUT_S = 10.0  # of a lane; a hand-shake with NCCL takes a few seconds
_QUEUED = 2  # chunks: the thread never waits for the event loop, and few are sent of a transfer that has ended
_LEAST_AHEAD_BYTES = 1 << 20  # that layers make before their step is over: what waits for more is tail


@dataclass(frozen=True)
class SendSettings:
    """What all pairs of one sender share."""

    identity: WorkerIdentity
    source: KvSource
    metrics: TransferMetrics
    staging: StagingSlots
    timeout_s: float
    chunk_bytes: int
    tls: TlsFiles | None


class Pair:
    """Made by KvSender; `connect` before anything else. Any error ends it, and all its transfers, for good.

    lanes: to choose from, best first. lane_failed: the one chosen did not come up, or nothing ever arrived over it,
    though the peer was there.
    """

    def __init__(
        self, settings: SendSettings, lanes: list[str], address: str, instance: str, broken: Callable[[Pair], None]
    ) -> None:
        self.address = address
        self.instance = instance
        self.lane_name = ""
        self.lane_failed = False
        self.error: PagewireError | None = None
        self._settings = settings
        self._lanes = lanes
        self._opening = False
        self._has_arrived = False  # anything that was sent over the lane
        self._broken = broken
        self._transfers: dict[bytes, Outgoing] = {}
        self._turns: deque[Outgoing] = deque()
        self._awake = asyncio.Event()
        self._outbox: asyncio.Queue[kv.ConnectRequest] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_queued = 0  # chunks that the thread has to send
        self._loop = asyncio.get_running_loop()
        self._thread = LaneThread(self._put, settings.timeout_s)
        self._stream = ControlStream(address, settings.tls)
        settings.metrics.pairs.inc()

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    async def connect(self) -> None:
        """Shakes hands and opens the lane. Raises nothing: `offer` does, when this has failed."""
        limit_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                hello = self._settings.identity.hello(self.instance, self._lanes)
                welcome = await self._stream.shake_hands(hello)
            await self._open_lane(welcome)
        except TimeoutError:
            self.fail(DeadlineExceeded(f"decode worker {self.address} did not answer within {limit_s:.1f} s"))
        except PagewireError as error:
            self.fail(error)
        except asyncio.CancelledError:
            self.fail(Cancelled("the pair was closed"))
            raise
        except Exception as error:
            self._fail_with_bug(error)
        if self.error is not None:
            return
        self._tasks.append(self._start(self._pump))
        log.info("kv pair up", peer=self.address, instance=self.instance, lane=self.lane_name, epoch=welcome.epoch)

    async def _open_lane(self, welcome: kv.Welcome) -> None:
        self.lane_name, self._opening = welcome.lane, True
        self._tasks = [self._start(self._read), self._start(self._write)]
        limit_s = min(self._settings.timeout_s, _OPEN_TIMEOUT_S)
        opening = self._thread.open(welcome.lane, PREFILL_RANK, self._settings.identity.host, welcome.epoch)
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wrap_future(opening)
        except TimeoutError:
            raise Unavailable(f"the {welcome.lane} lane did not come up within {limit_s:.1f} s") from None
        self._opening = False

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._guard(work))

    async def _guard(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The end of any of the pair's tasks is the end of the pair."""
        try:
            await work()
        except PagewireError as error:
            self.fail(error)
        except Exception as error:
            self._fail_with_bug(error)

    def _fail_with_bug(self, error: BaseException) -> None:
        """A bug, here or in the source: fails this pair, not the process."""
        log.error("kv pair failed", peer=self.address, exc_info=error)
        self.fail(Internal(f"sending KV failed: {type(error).__name__}"))

    async def offer(self, transfer_id: bytes, tokens: tuple[int, int], span: Span) -> Outgoing:
        """Opens a transfer, which ends `span`; returns when the peer has granted it. Raises what KvSender.open does."""
        if self.error is not None:
            raise self.error
        assert transfer_id not in self._transfers, "one transfer, one offer"
        limit = min(self._settings.chunk_bytes, self._thread.lane.most_bytes)
        plan = ChunkPlan(self._settings.identity.layout, tokens, limit, min(limit // 4, _LEAST_AHEAD_BYTES))
        outgoing = Outgoing(self, transfer_id, plan, self._settings.timeout_s, span)
        self._transfers[transfer_id] = outgoing
        self._turns.append(outgoing)
        trace = TraceContext(**dict(span.headers)) if span.headers else None
        offer = kv.Offer(transfer_id=transfer_id, token_begin=tokens[0], token_end=tokens[1], trace=trace)
        self.post(kv.ConnectRequest(offer=offer))
        await outgoing.granted()
        return outgoing

    def post(self, request: kv.ConnectRequest) -> None:
        if self.error is None:
            self._outbox.put_nowait(request)

    def _put(self, key: str, value: bytes) -> None:
        self.post(kv.ConnectRequest(store_put=kv.StorePut(key=key, value=value)))

    def wake(self) -> None:
        self._awake.set()

    def ended(self, outgoing: Outgoing) -> None:
        del self._transfers[outgoing.transfer_id]
        self._turns.remove(outgoing)
        outcome = type(outgoing.error).__name__ if outgoing.error else "ok"
        self._settings.metrics.transfers.labels(direction="sent", outcome=outcome).inc()
        if outgoing.error is None:
            stats = outgoing.stats()
            self._settings.metrics.sent(self.lane_name, stats.bytes, stats.transfer_us, stats.tail_us, stats.overlap)

    async def _write(self) -> None:
        while True:
            await self._stream.write(await self._outbox.get())

    async def _read(self) -> None:
        while True:
            self._take(await self._stream.read())

    def _take(self, response: kv.ConnectResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "store_put":
            self._thread.store.receive(response.store_put.key, response.store_put.value)
            return
        if kind in (None, "welcome"):
            raise Incompatible(f"decode worker {self.address} sent {kind or 'an empty message'} out of turn")
        message = getattr(response, kind)
        outgoing = self._transfers.get(message.transfer_id)
        if outgoing is None:
            return  # crossed our own Abort on its way
        if kind == "grant":
            outgoing.grant(message.window)
        elif kind == "chunk_ack":
            self._has_arrived = True
            outgoing.acknowledge(message.seq, message.resend)
            self._settings.metrics.resends.inc(message.resend)
        elif kind == "sealed_ack":
            outgoing.seal_acknowledged()
        else:
            outgoing.fail(from_proto(message.error))

    async def _pump(self) -> None:
        """Keeps the lane's thread busy, the transfers taking turns."""
        while True:
            self._awake.clear()
            if self._num_queued < _QUEUED and self._send_next():
                continue
            await self._awake.wait()

    def _send_next(self) -> bool:
        """Has the thread send a chunk of the first transfer that has one."""
        for _ in range(len(self._turns)):
            outgoing = self._turns[0]
            self._turns.rotate(-1)
            chunk = outgoing.next_chunk()
            if chunk is not None:
                self._num_queued += 1
                self._settings.staging.take()
                outgoing.gathering = self._thread.submit(self._send, outgoing, *chunk)
                outgoing.gathering.add_done_callback(partial(self._sent_soon, outgoing))
                return True
        return False

    def _send(self, outgoing: Outgoing, seq: int, part: ChunkRange) -> None:
        """On the lane's thread: pages -> staging -> wire."""
        if outgoing.error is not None:
            return
        layout, lane = self._settings.identity.layout, self._thread.lane
        wire = lane.staging(chunk_bytes(layout, part))
        shaped = from_bytes(layout, part, wire)
        checksum = self._settings.source.gather(outgoing.transfer_id, part.layers, part.tokens, shaped)
        chunk = kv.Chunk(
            transfer_id=outgoing.transfer_id,
            seq=seq,
            layer_begin=part.layers[0],
            layer_end=part.layers[1],
            token_begin=part.tokens[0],
            token_end=part.tokens[1],
            num_bytes=len(wire),
            checksum=checksum,
        )
        fault = faults.point("chunk-sent")
        if fault == "drop":
            return
        faults.point("bytes-sent")
        chunk.data = lane.send(wire)
        for _ in range(2 if fault == "duplicate" else 1):
            self._loop.call_soon_threadsafe(self._announce, outgoing, chunk)

    def _announce(self, outgoing: Outgoing, chunk: kv.Chunk) -> None:
        """The bytes are on the lane, so the peer must be told, whatever has become of the transfer."""
        outgoing.announced(chunk.seq, chunk.num_bytes, chunk.checksum)
        self.post(kv.ConnectRequest(chunk=chunk))
        self._settings.metrics.bytes.labels(direction="sent", lane=self.lane_name).inc(chunk.num_bytes)

    def _sent_soon(self, outgoing: Outgoing, job: Future[None]) -> None:
        self._settings.staging.give_back()
        self._loop.call_soon_threadsafe(self._sent, outgoing, job)

    def _sent(self, outgoing: Outgoing, job: Future[None]) -> None:
        """What came of a chunk: a failure of the source's is the transfer's, any other the pair's."""
        self._num_queued -= 1
        self.wake()
        error = job.exception()
        if isinstance(error, Cancelled):
            outgoing.abort(error)
        elif isinstance(error, PagewireError):
            self.fail(error)
        elif error is not None:
            self._fail_with_bug(error)

    def fail(self, error: PagewireError) -> None:
        """Ends the pair and every transfer on it. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        transfers = list(self._transfers.values())
        begun = any(outgoing.gathering is not None for outgoing in transfers)
        self.lane_failed = (self._opening or (begun and not self._has_arrived)) and not self._stream.was_cut
        for outgoing in transfers:
            outgoing.fail(error)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._thread.close()
        self._stream.cancel()
        self._settings.metrics.pairs.dec()
        log.info("kv pair down", peer=self.address, instance=self.instance, error=error.message)
        self._broken(self)

    async def closed(self) -> None:
        """Returns when the pair's connection and thread are gone. After `fail`."""
        await self._stream.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._thread.closed()
