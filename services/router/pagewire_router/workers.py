"""The workers that are alive, what they last said of their load, and what was sent to them since.

A worker is known by address: from the registry in Redis, or from --workers. It counts as alive while
its Stats stream runs; nothing else decides, so Redis may be away. One that has said nothing for 3 s is
suspect and gets nothing new; after 10 s it counts as dead, and what runs on it fails, also where its
connection still answers (a connection to a stopped process ends sooner). A process that comes back on
the same address is a new worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import grpc
import structlog
from pagewire.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc
from pagewire_core.block_events import HASH_BYTES
from pagewire_core.errors import PagewireError, Unavailable, from_rpc
from pagewire_core.feed import FeedReader
from pagewire_core.prefix_index import Snapshot
from pagewire_core.registry import RegisteredWorker
from pagewire_core.rpc import PROTOCOL, open_channel, speaks
from pagewire_core.tls import WORKER, TlsFiles

from pagewire_router.ledger import Booking, Ledger

log = structlog.get_logger(__name__)

_INFO_TIMEOUT_S = 3.0
_DEAD_S = 10.0  # without Stats, which come every second
_SNAPSHOT_TIMEOUT_S = 5.0
_MAX_HASHES = 8 << 20
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0


class Worker(Ledger):
    """One live worker process."""

    def __init__(self, info: worker_pb2.InfoResponse, address: str, channel: grpc.aio.Channel) -> None:
        super().__init__(info)
        self.address = address
        self.prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self.decode = decode_pb2_grpc.DecodeServiceStub(channel)
        self.control = worker_pb2_grpc.WorkerServiceStub(channel)
        self.feed = FeedReader(lambda feed_id: self.decode.Feed(decode_pb2.FeedRequest(feed_id=feed_id)))
        self._num_users = 0
        self.unused = asyncio.Event()  # set while nobody has a call of its own to it
        self.unused.set()
        self._watchers: set[Callable[[PagewireError], None]] = set()

    @contextlib.contextmanager
    def watched(self, dead: Callable[[PagewireError], None]) -> Iterator[None]:
        """While the body runs, `dead` is told when the worker counts as dead."""
        self._watchers.add(dead)
        try:
            yield
        finally:
            self._watchers.discard(dead)

    def declare_dead(self) -> None:
        for tell in list(self._watchers):
            tell(Unavailable(f"it has said nothing for {_DEAD_S:.0f} s"))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The body makes calls: the channel is not closed meanwhile, which would cancel who waits for them."""
        self._num_users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self._num_users -= 1
            if not self._num_users:
                self.unused.set()

    @contextlib.contextmanager
    def booked(self, booking: Booking) -> Iterator[None]:
        with self.used(), super().booked(booking):
            yield


class WorkerTable:
    """Live workers by id. `joined`, `left` and `switched` (to another role) are told of every change, `reported` of
    every report; `wait_changed` wakes who waits for one.
    """

    def __init__(
        self,
        model_digest: bytes,
        joined: Callable[[Worker], None] = lambda worker: None,
        left: Callable[[Worker], None] = lambda worker: None,
        tls: TlsFiles | None = None,
        reported: Callable[[Worker], None] = lambda worker: None,
        switched: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        self._model_digest = model_digest
        self._joined = joined
        self._left = left
        self._reported = reported
        self._switched = switched
        self._tls = tls
        self._live: dict[str, Worker] = {}
        self._static: set[str] = set()
        self._registered: dict[str, str] = {}  # address -> the instance that is there
        self._appeared: dict[str, asyncio.Event] = {}  # by address; set by another instance than was there
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # address -> what was last logged
        self._silent_since: dict[str, float] = {}  # address -> loop time; inf: that has been logged
        self._changed = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> list[Worker]:
        return list(self._live.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._live.get(worker_id)

    @property
    def usable(self) -> bool:
        """Whether some request could be served: anyone who decodes can prefill too."""
        return any(w.can_decode for w in self._live.values())

    @property
    def max_model_len(self) -> int | None:
        """Context that every live worker allows, in tokens."""
        return min((w.info.max_model_len for w in self._live.values() if w.info.max_model_len), default=None)

    def max_choices(self, one_token: bool) -> int | None:
        """Sequences of one request that some live worker can run; one_token: of who computes prompts, too."""
        able = [w for w in self._live.values() if w.can_decode or (one_token and w.info.one_token)]
        return max((int(w.stats.max_num_seqs) for w in able), default=0) or None

    async def wait_changed(self, timeout_s: float) -> None:
        """Returns when a worker joins, leaves or reports, or after the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def set_static(self, addresses: Iterable[str]) -> None:
        self._static = set(addresses)
        self._follow_known()

    def set_registered(self, workers: Iterable[RegisteredWorker]) -> None:
        """What the registry lists now. A live worker that is not listed stays until its stream ends."""
        before, self._registered = self._registered, {worker.address: worker.instance for worker in workers}
        self._follow_known()
        for address, instance in self._registered.items():
            if before.get(address) != instance:
                self._appeared[address].set()

    async def close(self) -> None:
        followers = list(self._followers.values())
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        self._followers.clear()
        await asyncio.gather(*self._retiring)

    async def snapshot(self, worker_id: str) -> Snapshot | None:
        """Every block hash of a worker, from itself; None if it is gone or does not answer."""
        worker = self._live.get(worker_id)
        if worker is None:
            return None
        hashes: list[bytes] = []
        sequence = 0
        with worker.used(), contextlib.suppress(grpc.RpcError):
            async for part in worker.control.Snapshot(worker_pb2.SnapshotRequest(), timeout=_SNAPSHOT_TIMEOUT_S):
                if len(hashes) + len(part.hashes) > _MAX_HASHES or any(len(h) != HASH_BYTES for h in part.hashes):
                    return None
                hashes.extend(part.hashes)
                sequence = part.sequence
            return Snapshot(sequence, hashes)
        return None

    def _follow_known(self) -> None:
        for address in (self._static | self._registered.keys()) - self._followers.keys():
            self._appeared[address] = asyncio.Event()
            self._followers[address] = asyncio.create_task(self._follow(address))

    async def _follow(self, address: str) -> None:
        """Connects to one address again and again as long as it is known; at once when somebody registers it."""
        appeared = self._appeared[address]
        backoff = _MIN_BACKOFF_S
        while address in self._static or address in self._registered:
            lived = await self._one_life(address)
            backoff = _MIN_BACKOFF_S if lived else min(2 * backoff, _MAX_BACKOFF_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await appeared.wait()
            appeared.clear()
        self._followers.pop(address, None)
        self._appeared.pop(address, None)
        self._silent_since.pop(address, None)

    async def _one_life(self, address: str) -> bool:
        """Follows a worker from its first word to its last; says whether it was alive at all."""
        channel = open_channel(address, self._tls, WORKER)
        worker: Worker | None = None
        try:
            worker = await self._introduced(address, channel)
            return worker is not None and await self._alive(worker)
        finally:
            if worker is not None:
                self._leave(worker)
            retiring = asyncio.create_task(_retire(channel, worker))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def _introduced(self, address: str, channel: grpc.aio.Channel) -> Worker | None:
        """The worker at an address; None if it does not answer or is not fit to join."""
        control = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            info = await control.Info(worker_pb2.InfoRequest(), timeout=_INFO_TIMEOUT_S)
        except grpc.RpcError as error:
            if self._stays_silent(address):
                self._refuse(address, f"does not answer: {from_rpc(error).message}")
            return None
        self._silent_since.pop(address, None)
        if why := self._unfit(info):
            self._refuse(address, why)
            return None
        return None if self._is_double(info, address) else Worker(info, address, channel)

    async def _alive(self, worker: Worker) -> bool:
        reports = worker.control.Stats(worker_pb2.StatsRequest())
        why: str = "stream ended"
        try:
            while True:
                async with asyncio.timeout(_DEAD_S):
                    report = await reports.read()
                if report is grpc.aio.EOF:
                    break
                role = worker.role
                worker.report(report)
                self._reported(worker)
                if worker.role != role:
                    log.info("worker changed its role", worker_id=worker.worker_id, role=_name(worker.role))
                    self._switched(worker)
                if report.draining:
                    self._leave(worker)  # what runs there ends there; nothing new is sent
                elif self._is_double(worker.info, worker.address):  # both were introduced before either joined
                    why = "known by another address"
                    break
                else:
                    self._join(worker)
        except TimeoutError:
            why = "no report for too long"
            worker.declare_dead()
        except (grpc.RpcError, PagewireError) as error:
            why = from_rpc(error).message if isinstance(error, grpc.RpcError) else error.message
        finally:
            reports.cancel()
        log.info("worker stream ended", worker_id=worker.worker_id, address=worker.address, reason=why)
        return self._live.get(worker.worker_id) is worker

    def _unfit(self, info: worker_pb2.InfoResponse) -> str:
        if not speaks(info.protocol):
            return f"speaks protocol {info.protocol}, this router {PROTOCOL}: run versions that follow each other"
        if info.model_digest != self._model_digest:
            return "serves other weights than this router: start both with the same --model"
        return ""

    def _is_double(self, info: worker_pb2.InfoResponse, address: str) -> bool:
        """Whether another address has this worker, or another process of its id."""
        known = self._live.get(info.worker_id)
        if known is None or known.address == address:
            return False
        if known.info.instance != info.instance:
            self._refuse(address, f"has the worker id of {known.address}: give it another --worker-id")
        return True

    def _stays_silent(self, address: str) -> bool:
        """Whether it has now been silent for long, as one at an address that cannot be reached from here. True once;
        who starts or has just ended is silent as well, and nothing to tell of.
        """
        now = asyncio.get_running_loop().time()
        if now - self._silent_since.setdefault(address, now) < _DEAD_S:
            return False
        self._silent_since[address] = math.inf
        return True

    def _refuse(self, address: str, why: str) -> None:
        if self._refused.get(address) != why:
            self._refused[address] = why
            log.error("worker refused", address=address, reason=why)

    def _join(self, worker: Worker) -> None:
        if self._live.get(worker.worker_id) is not worker:
            self._live[worker.worker_id] = worker
            self._refused.pop(worker.address, None)
            log.info("worker joined", worker_id=worker.worker_id, address=worker.address, role=_name(worker.role))
            self._joined(worker)
            if worker.can_decode:
                worker.feed.open()
        self._notify()

    def _leave(self, worker: Worker) -> None:
        if self._live.get(worker.worker_id) is worker:
            del self._live[worker.worker_id]
            log.info("worker left", worker_id=worker.worker_id, address=worker.address)
            self._left(worker)
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _name(role: common_pb2.WorkerRole) -> str:
    return common_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()


async def _retire(channel: grpc.aio.Channel, worker: Worker | None) -> None:
    """Closes a channel once nobody uses it: closing would end its calls without a word to them."""
    if worker is not None:
        await worker.unused.wait()
        await worker.feed.close()
    await channel.close()
