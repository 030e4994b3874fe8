"""The receiving half of a worker: KvChannelService, one call of it per prefill worker."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import KvChannelServiceServicer
from pagewire_core import tracing
from pagewire_core.errors import DeadlineExceeded, Incompatible, PagewireError, Unavailable

from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.landing import ReceiveSettings
from pagewire_transfer.metrics import StagingSlots, TransferMetrics
from pagewire_transfer.receiving_pair import ReceivingPair
from pagewire_transfer.sink import KvSink, ReceiveStats

__all__ = ["KvChannelServicer", "KvSink", "ReceiveStats"]


_MAX_HELLO_BYTES = 16 << 10
_LOOK_S, _LOOKS = 0.02, 50  # of a pair that may soon receive nothing any more


class KvChannelServicer(KvChannelServiceServicer):
    """Receives KV into a sink. Lives on the event loop.

    timeout_s: how long a lane operation or a handshake may take before the peer counts as lost.
    window: chunks of one transfer that may be unacknowledged. lend: sends a cached prefix to a worker that asks.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        sink: KvSink,
        *,
        lanes: list[str],
        metrics: TransferMetrics,
        timeout_s: float,
        window: int = 8,
    ) -> None:
        self._staging = StagingSlots(metrics.staging_slots)
        self._settings = ReceiveSettings(identity, sink, lanes, metrics, self._staging, timeout_s, window)
        self._epochs = itertools.count(1)
        self._pairs: set[ReceivingPair] = set()
        self._owners: dict[bytes, ReceivingPair] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()  # those of them that end with a pair's thread
        self.lend: Callable[[kv.FetchRequest], Awaitable[kv.FetchResponse]] = _nothing_to_lend

    @property
    def staging_slots(self) -> int:
        """Chunks held between the wire and the pages."""
        return self._staging.held

    @property
    def open_transfers(self) -> int:
        return len(self._owners)

    def abort(self, transfer_id: bytes, error: PagewireError) -> None:
        """The decode side ends a transfer: tells the peer why, and the sink nothing. Idempotent.

        Bytes on their way are received and dropped. Only where `bind` is still running and then
        succeeds is `failed` called after it, so that what it bound is given back.
        """
        pair = self._owners.get(transfer_id)
        if pair is not None:
            pair.abort(transfer_id, error)

    async def release(self) -> None:
        """Closes the pairs that receive nothing; peers make new ones. Returns when their threads are gone.

        An offer that has just come, or is about to, is still to be refused: such a pair is waited for, a little; ended
        while its lane opens, the peer would take it for a lane that fails. One that goes on to receive, a prefix that
        is fetched, stays.
        """
        leaving = set(self._pairs)
        for _ in range(_LOOKS):
            for pair in leaving:
                if pair.is_idle:
                    pair.close(Unavailable("this worker has nothing to receive any more"))
            await asyncio.sleep(_LOOK_S)
            leaving &= self._pairs
            if not leaving:
                break
        if self._closing:
            await asyncio.wait(set(self._closing))

    async def close(self) -> None:
        """Fails every open transfer and returns when nothing of it runs any more; stop the server first."""
        for pair in list(self._pairs):
            pair.close(Unavailable("the decode worker is shutting down"))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def Fetch(self, request: kv.FetchRequest, context: grpc.aio.ServicerContext) -> kv.FetchResponse:
        if request.expect_instance != self._settings.identity.instance:
            raise Unavailable(f"this is {self._settings.identity.instance}, not {request.expect_instance}")
        with tracing.begin("pagewire.v1.KvChannelService/Fetch"):
            return await self.lend(request)

    async def Connect(
        self, request_iterator: AsyncIterator[kv.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[kv.ConnectResponse]:
        hello = await self._hello(request_iterator)
        identity, lanes = self._settings.identity, self._settings.lanes
        identity.check(hello)
        lane, epoch = identity.choose_lane(hello, lanes), next(self._epochs)
        yield kv.ConnectResponse(welcome=kv.Welcome(instance=identity.instance, lane=lane, epoch=epoch))
        pair = ReceivingPair(self._settings, hello, lane, self._owners, self._spawn)
        self._pairs.add(pair)
        try:
            pair.start(request_iterator, epoch)
            async for response in pair.responses():
                yield response
        finally:  # no await here: a vanished client cancels this very coroutine
            pair.close(Unavailable(f"prefill worker {hello.worker_id!r} was lost"))
            self._pairs.discard(pair)
            closing = self._spawn(pair.closed())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _hello(self, requests: AsyncIterator[kv.ConnectRequest]) -> kv.Hello:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                request = await anext(aiter(requests), kv.ConnectRequest())
        except TimeoutError:
            raise DeadlineExceeded("no Hello came") from None
        except DecodeError:
            raise Incompatible("the peer sent bytes that are no message") from None
        if request.WhichOneof("message") != "hello":
            raise Incompatible("the first message of a KV channel must be Hello")
        if request.ByteSize() > _MAX_HELLO_BYTES:
            raise Incompatible(f"a Hello has at most {_MAX_HELLO_BYTES} bytes")
        return request.hello

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _nothing_to_lend(request: kv.FetchRequest) -> kv.FetchResponse:
    raise Unavailable("this worker lends no prefixes")
