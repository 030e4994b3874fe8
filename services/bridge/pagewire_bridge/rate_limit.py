"""Requests and tokens per minute of each API key: token buckets, in Redis, so that all bridges count together.

A bucket holds a minute's worth and fills evenly. A request takes one from its bucket when it begins, and needs the
bucket of tokens not to be empty; what it used is taken from that one when it ends, which may leave a debt. Where
Redis does not answer, each bridge counts for itself: a limit is then kept per bridge, and no request fails for it.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

import structlog
from pagewire_core.errors import Overloaded
from pagewire_core.redis_link import REDIS_ERRORS, open_redis

from pagewire_bridge.keys import ApiKey

log = structlog.get_logger(__name__)

_REDIS_TIMEOUT_S = 0.25
_REDIS_PAUSE_S = 5.0  # after a failure
_PREFIX = "pw:rate:"

# KEYS: bucket. ARGV: capacity, cost, least level. Returns what is left; below zero, nothing was taken and the answer is
# how much is missing. A bucket that nobody touches for a minute is full, so it may be forgotten. Where the clock was
# set back, or another server took over whose is behind, a bucket goes on from where it was.
_TAKE = """
local now = redis.call('TIME')
now = tonumber(now[1]) + tonumber(now[2]) / 1e6
local capacity, cost, least = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local known = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = capacity
if known[1] then
  local passed = now - tonumber(known[2])
  if passed < 0 then
    passed = 0
    redis.call('HSET', KEYS[1], 'at', tostring(now))
  end
  level = math.min(capacity, tonumber(known[1]) + passed * capacity / 60)
end
if level < least then return tostring(level - least) end
level = level - cost
redis.call('HSET', KEYS[1], 'level', tostring(level), 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], 60 + math.max(0, math.ceil(-60 * level / capacity)))
return tostring(level)
"""


@dataclass(frozen=True)
class Left:
    """What is left of one limit. reset_s: until it is whole again."""

    limit: int
    remaining: float

    @property
    def reset_s(self) -> float:
        return (self.limit - self.remaining) * 60 / self.limit


@dataclass(frozen=True)
class Standing:
    requests: Left | None
    tokens: Left | None

    def headers(self) -> dict[str, str]:
        """OpenAI's names."""
        found = {}
        for name, left in (("requests", self.requests), ("tokens", self.tokens)):
            if left is not None:
                found[f"x-ratelimit-limit-{name}"] = str(left.limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left.remaining)))
                found[f"x-ratelimit-reset-{name}"] = f"{left.reset_s:.3f}s"
        return found


class RateLimiter:
    """redis_url: None: this bridge is the only one."""

    def __init__(self, redis_url: str | None) -> None:
        self._redis = open_redis(redis_url) if redis_url else None
        self._take_script = self._redis.register_script(_TAKE) if self._redis else None
        self._local: dict[str, tuple[float, float]] = {}  # bucket -> level, at
        self._away_until = 0.0

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    async def admit(self, key: ApiKey) -> Standing:
        """Counts a request. Raises Overloaded, with the time after which it is worth trying again."""
        requests = await self._spend(key, "requests", key.requests_per_minute, cost=1, least=1)
        tokens = await self._spend(key, "tokens", key.tokens_per_minute, cost=0, least=1e-9)
        return Standing(requests, tokens)

    async def charge(self, key: ApiKey, num_tokens: int) -> None:
        """Takes what a request has used."""
        if key.tokens_per_minute is not None:
            await self._take(f"{key.name}:tokens", key.tokens_per_minute, num_tokens, -math.inf)

    async def _spend(self, key: ApiKey, what: str, limit: int | None, *, cost: float, least: float) -> Left | None:
        if limit is None:
            return None
        left = await self._take(f"{key.name}:{what}", limit, cost, least)
        if left < 0:
            wait_s = -left * 60 / limit
            raise Overloaded(f"This key's limit of {limit} {what} per minute is used up.", retry_after_s=wait_s)
        return Left(limit, left)

    async def _take(self, bucket: str, capacity: int, cost: float, least: float) -> float:
        """What is left, or below zero how much is missing."""
        if self._take_script is not None and time.monotonic() >= self._away_until:
            bound = str(max(least, -1e15))
            try:
                async with asyncio.timeout(_REDIS_TIMEOUT_S):
                    return float(await self._take_script(keys=[_PREFIX + bucket], args=[capacity, cost, bound]))
            except REDIS_ERRORS as error:
                self._away_until = time.monotonic() + _REDIS_PAUSE_S
                log.warning("rate limits are counted by this bridge alone", error=type(error).__name__)
        now = time.monotonic()
        level, at = self._local.get(bucket, (float(capacity), now))
        level = min(capacity, level + (now - at) * capacity / 60)
        if level < least:
            return level - least
        self._local[bucket] = (level - cost, now)
        return level - cost
