"""The sending half of a worker: one per prefill worker, one pair per decode worker it sends to."""

from __future__ import annotations

import asyncio

import structlog
from pagewire_core import tracing
from pagewire_core.errors import Unavailable
from pagewire_core.tls import TlsFiles

from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.metrics import StagingSlots, TransferMetrics
from pagewire_transfer.outgoing import Outgoing, SendStats
from pagewire_transfer.pair import Pair, SendSettings
from pagewire_transfer.source import KvSource
from pagewire_transfer.wire import MAX_CHUNK_BYTES

__all__ = ["KvSender", "KvSource", "Outgoing", "SendStats"]

log = structlog.get_logger(__name__)


class KvSender:
    """Opens transfers to decode workers. Lives on the event loop.

    A pair is made on first use, shared by concurrent transfers, and dropped on its first error; the
    next use makes a new one, and on the next lane if nothing ever arrived over the last one.
    timeout_s: how long a peer may stand still before it counts as lost.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        source: KvSource,
        *,
        lanes: list[str],
        metrics: TransferMetrics,
        timeout_s: float,
        chunk_bytes: int = MAX_CHUNK_BYTES,
        tls: TlsFiles | None = None,
    ) -> None:
        assert chunk_bytes <= MAX_CHUNK_BYTES
        self._staging = StagingSlots(metrics.staging_slots)
        self._settings = SendSettings(identity, source, metrics, self._staging, timeout_s, chunk_bytes, tls)
        self._lanes = lanes
        self._reordered: dict[tuple[str, str], list[str]] = {}  # by pair: the lanes, those that failed with it last
        self._pairs: dict[tuple[str, str], tuple[Pair, asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def staging_slots(self) -> int:
        """Chunks held between the pages and the wire."""
        return self._staging.held

    @property
    def open_transfers(self) -> int:
        return sum(pair.num_transfers for pair, _ in self._pairs.values())

    async def open(self, transfer_id: bytes, address: str, instance: str, tokens: tuple[int, int]) -> Outgoing:
        """Offers KV of prompt tokens [begin, end) to a decode worker; returns when it has bound its pages.

        address: host:port of its KvChannelService; instance: the incarnation that must answer.
        Raises Unavailable, Overloaded, Incompatible or DeadlineExceeded, or what the peer refused with.
        Being cancelled takes the offer back.
        """
        what: tracing.Attributes = {"pagewire.transferred_tokens": tokens[1] - tokens[0], "server.address": address}
        span = tracing.current().child("transfer", what, "client")
        try:
            pair = await self._connected(address, instance)
            return await pair.offer(transfer_id, tokens, span)
        except BaseException as error:
            span.fail(error)
            span.end()
            raise

    async def _connected(self, address: str, instance: str) -> Pair:
        """The pair, which may have failed; a new one where there is none. A lane that does not come up costs a moment
        and no transfer: the next one is tried at once.
        """
        key = (address, instance)
        for _ in self._lanes:
            if self._closed:
                raise Unavailable("this prefill worker is shutting down")
            if key not in self._pairs:
                pair = Pair(self._settings, self._reordered.get(key, self._lanes), address, instance, self._drop)
                self._pairs[key] = pair, asyncio.create_task(pair.connect())
            pair, connecting = self._pairs[key]
            await asyncio.wait([connecting])
            if not pair.lane_failed:
                break
        return pair

    def _drop(self, pair: Pair) -> None:
        key = (pair.address, pair.instance)
        self._pairs.pop(key, None)
        if pair.lane_failed:
            log.warning("kv lane failed", peer=pair.address, lane=pair.lane_name, error=str(pair.error))
            others = [lane for lane in self._reordered.get(key, self._lanes) if lane != pair.lane_name]
            self._reordered[key] = [*others, pair.lane_name]
        task = asyncio.create_task(pair.closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def release(self) -> None:
        """Closes the pairs that send nothing; the next use makes new ones. Returns when their threads are gone."""
        for pair, connecting in list(self._pairs.values()):
            if connecting.done() and not pair.num_transfers:
                pair.fail(Unavailable("this worker has nothing to send any more"))
        if self._closing:
            await asyncio.wait(set(self._closing))

    async def close(self) -> None:
        """Fails every open transfer and returns when all connections and threads are gone."""
        self._closed = True
        pairs = list(self._pairs.values())
        for pair, connecting in pairs:
            pair.fail(Unavailable("the prefill worker is shutting down"))
            connecting.cancel()  # gRPC forgets who writes to a call that ends before it is connected
        await asyncio.gather(*(connecting for _, connecting in pairs), return_exceptions=True)
        while self._closing:
            await asyncio.wait(self._closing)
