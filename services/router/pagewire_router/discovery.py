"""Reads the worker registry in Redis and tells the worker table who is listed."""

from __future__ import annotations

import asyncio

from pagewire_core.redis_client import Redis
from pagewire_core.redis_link import RedisLink
from pagewire_core.registry import list_workers

from pagewire_router.workers import WorkerTable

_EVERY_S, _WANTING_S = 0.5, 0.1  # the latter while nobody can be served


class Discovery:
    """While Redis is away the last list stands: workers are followed by their own streams."""

    def __init__(self, redis_url: str, workers: WorkerTable) -> None:
        self._link = RedisLink(redis_url, "discovery")
        self._workers = workers

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def run(self) -> None:
        await self._link.run(self._read)

    async def _read(self, redis: Redis) -> None:
        while True:
            listed = await list_workers(redis)
            self._link.alive()
            self._workers.set_registered(listed)
            await asyncio.sleep(_EVERY_S if self._workers.usable else _WANTING_S)
