"""Values that are kept for a while: in Redis, so that all bridges find them, or in this bridge alone.

A key holds bytes or a list of them. Whatever is written, or read with a `ttl_s`, lives on for so many seconds.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from pagewire_core.errors import Unavailable
from pagewire_core.redis_link import REDIS_ERRORS, open_redis

log = structlog.get_logger(__name__)

_TIMEOUT_S = 1.0
_PAUSE_S = 2.0  # after a failure of Redis
MAX_LOCAL_BYTES = 64 << 20


# KEYS: value, lease. ARGV: value, its seconds, the lease's seconds (0: it ends).
_PUT_UNDER = """
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if ARGV[3] == '0' then redis.call('DEL', KEYS[2]) else redis.call('EXPIRE', KEYS[2], ARGV[3]) end
return 1
"""


# KEYS: list. ARGV: its seconds, the number of the first value, values.
_APPEND = """
local known = redis.call('LLEN', KEYS[1]) - ARGV[2]
if known >= 0 then
  for i = 3 + known, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""


class Shelf(Protocol):
    """Everything raises Unavailable where the values cannot be reached."""

    async def get(self, key: str, ttl_s: float | None = None) -> bytes | None: ...

    async def put(self, key: str, value: bytes, ttl_s: float) -> None: ...

    async def put_under(self, lease: str, lease_s: float, key: str, value: bytes, ttl_s: float) -> bool:
        """Puts it only if there is a value at `lease`, which then lives for lease_s; 0: it ends. Whether it did."""

    async def renew(self, key: str, ttl_s: float) -> bool:
        """Whether there is such a key."""

    async def append(self, key: str, first: int, values: Sequence[bytes], ttl_s: float) -> None:
        """Puts values into a list from the number `first` on, but for those that are there: what was not answered, and
        may have been done all the same, can be asked again. Nothing where values before them are missing.
        """

    async def push(self, key: str, value: bytes, ttl_s: float) -> bool:
        """Adds a value to a list that is there; whether it was."""

    async def since(self, key: str, first: int) -> list[bytes]:
        """The values of a list, from this one on."""

    async def delete(self, *keys: str) -> bool:
        """Whether there was anything."""

    async def close(self) -> None: ...


def open_shelf(redis_url: str | None) -> Shelf:
    return RedisShelf(redis_url) if redis_url else LocalShelf()


class RedisShelf:
    def __init__(self, url: str) -> None:
        self._redis = open_redis(url)
        self._put_under = self._redis.register_script(_PUT_UNDER)
        self._append = self._redis.register_script(_APPEND)
        self._away_until = 0.0

    async def get(self, key: str, ttl_s: float | None = None) -> bytes | None:
        ends = None if ttl_s is None else math.ceil(ttl_s)
        return await self._ask(lambda: self._redis.getex(key, ex=ends))

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await self._ask(lambda: self._redis.set(key, value, ex=math.ceil(ttl_s)))

    async def put_under(self, lease: str, lease_s: float, key: str, value: bytes, ttl_s: float) -> bool:
        arguments: list[bytes | int] = [value, math.ceil(ttl_s), math.ceil(lease_s)]
        return bool(await self._ask(lambda: self._put_under(keys=[key, lease], args=arguments)))

    async def renew(self, key: str, ttl_s: float) -> bool:
        return bool(await self._ask(lambda: self._redis.expire(key, math.ceil(ttl_s))))

    async def append(self, key: str, first: int, values: Sequence[bytes], ttl_s: float) -> None:
        arguments: list[bytes | int] = [math.ceil(ttl_s), first, *values]
        await self._ask(lambda: self._append(keys=[key], args=arguments))

    async def push(self, key: str, value: bytes, ttl_s: float) -> bool:
        known = await self._ask(lambda: self._redis.execute_command("RPUSHX", key, value))
        return bool(known) and await self.renew(key, ttl_s)

    async def since(self, key: str, first: int) -> list[bytes]:
        found: list[bytes] = await self._ask(lambda: self._redis.lrange(key, first, -1))
        return found

    async def delete(self, *keys: str) -> bool:
        return bool(await self._ask(lambda: self._redis.delete(*keys)))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, command: Callable[[], Awaitable[Any]]) -> Any:
        if time.monotonic() < self._away_until:
            raise self._away()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await command()
        except REDIS_ERRORS as error:
            self._away_until = time.monotonic() + _PAUSE_S
            log.warning("stored responses cannot be reached", error=type(error).__name__)
            raise self._away() from error

    def _away(self) -> Unavailable:
        return Unavailable("Stored responses cannot be reached right now; try again.", retry_after_s=_PAUSE_S)


@dataclass
class _Kept:
    values: list[bytes]
    ends: float

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.values))


class LocalShelf:
    """For a bridge without Redis. What was used longest ago goes when there is no more room."""

    def __init__(self, max_bytes: int = MAX_LOCAL_BYTES) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._max_bytes, self._num_bytes = max_bytes, 0

    async def get(self, key: str, ttl_s: float | None = None) -> bytes | None:
        kept = self._find(key)
        if kept and ttl_s is not None:
            await self.renew(key, ttl_s)
        return kept.values[0] if kept else None

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await self.delete(key)
        await self.append(key, 0, [value], ttl_s)

    async def put_under(self, lease: str, lease_s: float, key: str, value: bytes, ttl_s: float) -> bool:
        if not await self.renew(lease, lease_s):
            return False
        if not lease_s:
            await self.delete(lease)
        await self.put(key, value, ttl_s)
        return True

    async def renew(self, key: str, ttl_s: float) -> bool:
        if kept := self._find(key):
            kept.ends = time.monotonic() + ttl_s
            self._kept.move_to_end(key)
        return kept is not None

    async def append(self, key: str, first: int, values: Sequence[bytes], ttl_s: float) -> None:
        kept = self._find(key) or _Kept([], math.inf)
        if len(kept.values) < first:
            return
        new = values[len(kept.values) - first :]
        kept.values += new
        self._num_bytes += sum(map(len, new))
        self._kept[key] = kept
        await self.renew(key, ttl_s)
        while self._num_bytes > self._max_bytes:
            await self.delete(next(iter(self._kept)))

    async def push(self, key: str, value: bytes, ttl_s: float) -> bool:
        kept = self._find(key)
        if kept:
            await self.append(key, len(kept.values), [value], ttl_s)
        return kept is not None

    async def since(self, key: str, first: int) -> list[bytes]:
        kept = self._find(key)
        return kept.values[first:] if kept else []

    async def delete(self, *keys: str) -> bool:
        gone = [kept for key in keys if (kept := self._kept.pop(key, None))]
        self._num_bytes -= sum(kept.num_bytes for kept in gone)
        return bool(gone)

    async def close(self) -> None:
        self._kept.clear()

    def _find(self, key: str) -> _Kept | None:
        kept = self._kept.get(key)
        if kept and kept.ends < time.monotonic():
            self._num_bytes -= self._kept.pop(key).num_bytes
            return None
        return kept
