"""WorkerService: who this worker is, how loaded it is, what it holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from pagewire_core.telemetry import exposition
from prometheus_client import CollectorRegistry

from pagewire_worker.roles import Roles

_POLL_S, _IDLE_POLL_S = 0.05, 0.25  # load is looked at this often and sent when it changed; the latter if it has not
_BUSY_S = 1.0  # for so long
_AT_LEAST_EVERY_S = 1.0
_HASHES_PER_MESSAGE = 10_000


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """stats: the load now. snapshot: sequence number and hashes of the prefix cache. reset: forgets what it can."""

    def __init__(
        self,
        info: worker_pb2.InfoResponse,
        stats: Callable[[], worker_pb2.StatsResponse],
        snapshot: Callable[[], tuple[int, list[bytes]]],
        registry: CollectorRegistry,
        roles: Roles,
        reset: Callable[[], int],
        unready: Callable[[], Awaitable[None]],
    ) -> None:
        """unready: has the health service say that nothing new is taken."""
        self._info, self._stats, self._snapshot, self._registry = info, stats, snapshot, registry
        self._roles, self._reset, self._unready = roles, reset, unready

    async def Info(self, request: worker_pb2.InfoRequest, context: grpc.aio.ServicerContext) -> worker_pb2.InfoResponse:
        self._info.role = self._roles.role
        return self._info

    async def Stats(
        self, request: worker_pb2.StatsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.StatsResponse]:
        sent, sent_at, changed_at = None, 0.0, 0.0
        while True:
            stats, now = self._stats(), time.monotonic()
            changed = stats != sent
            if changed:
                changed_at = now
            if changed or now - sent_at >= _AT_LEAST_EVERY_S:
                yield stats
                sent, sent_at = stats, now
            await asyncio.sleep(_POLL_S if now - changed_at < _BUSY_S else _IDLE_POLL_S)

    async def Snapshot(
        self, request: worker_pb2.SnapshotRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SnapshotResponse]:
        sequence, hashes = self._snapshot()
        for start in range(0, max(len(hashes), 1), _HASHES_PER_MESSAGE):
            part = hashes[start : start + _HASHES_PER_MESSAGE]
            yield worker_pb2.SnapshotResponse(hashes=part, sequence=sequence)

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.DrainResponse]:
        await self._unready()
        async for num_running in _changes(self._roles.drain(max(request.timeout_s, 0.0))):
            yield worker_pb2.DrainResponse(num_running=num_running)

    async def SetRole(
        self, request: worker_pb2.SetRoleRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SetRoleResponse]:
        async for num_running in _changes(self._roles.switch(request.role, max(request.timeout_s, 0.0))):
            yield worker_pb2.SetRoleResponse(num_running=num_running)

    async def ResetPrefixCache(
        self, request: worker_pb2.ResetPrefixCacheRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ResetPrefixCacheResponse:
        return worker_pb2.ResetPrefixCacheResponse(num_blocks=await asyncio.to_thread(self._reset))

    async def Metrics(
        self, request: worker_pb2.WorkerServiceMetricsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerServiceMetricsResponse:
        return worker_pb2.WorkerServiceMetricsResponse(text=exposition(self._registry))


async def _changes(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
    """Each number that is another than the one before."""
    told = -1
    async for number in numbers:
        if number != told:
            yield number
            told = number
