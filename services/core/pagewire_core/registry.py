"""Which workers there are, in Redis: a hash `pd:w:{worker_id}` that lives 6 s, renewed every 2 s.

`pd:w` is a sorted set of worker ids by last heartbeat (seconds since the epoch, by Redis' own clock).
A reader learns addresses here and everything else from the worker itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagewire_core.redis_client import Redis
from pagewire_core.redis_link import REDIS_ERRORS, RedisLink, open_redis

HEARTBEAT_S = 2.0
LIFETIME_S = 6.0
_INDEX_KEY = "pd:w"
_MAX_WORKERS = 4096
_MAX_FIELD_LENGTH = 512


def _key(worker_id: str) -> str:
    return f"pd:w:{worker_id}"


@dataclass(frozen=True)
class RegisteredWorker:
    worker_id: str
    instance: str
    address: str
    role: str


class Registration:
    """One worker's entry.

    `fields` are strings or numbers; worker_id, instance, address and role must be among them. `run`
    keeps the entry alive until it is cancelled; `deregister` takes it away at once, if Redis is there.
    """

    def __init__(self, redis_url: str, fields: Mapping[str, str | int]) -> None:
        missing = {"worker_id", "instance", "address", "role"} - fields.keys()
        if missing:
            raise ValueError(f"registration lacks {sorted(missing)}")
        self._redis_url = redis_url
        self._fields: dict[Any, Any] = dict(fields)
        self._link = RedisLink(redis_url, "registry")

    def set_role(self, role: str) -> None:
        """From the next renewal on."""
        self._fields["role"] = role

    async def run(self) -> None:
        await self._link.run(self._heartbeats)

    async def deregister(self) -> None:
        """Removes the entry if it is still this instance's. Redis being away is no error."""
        worker_id = str(self._fields["worker_id"])
        redis = open_redis(self._redis_url)
        try:
            if await redis.hget(_key(worker_id), "instance") == str(self._fields["instance"]).encode():
                await redis.delete(_key(worker_id))
                await redis.zrem(_INDEX_KEY, worker_id)
        except REDIS_ERRORS:
            return  # the entry ends by itself
        finally:
            await redis.aclose()

    async def _heartbeats(self, redis: Redis) -> None:
        worker_id = str(self._fields["worker_id"])
        while True:
            now, _ = await redis.time()
            pipe = redis.pipeline(transaction=True)
            pipe.hset(_key(worker_id), mapping=self._fields)
            pipe.pexpire(_key(worker_id), int(LIFETIME_S * 1000))
            pipe.zadd(_INDEX_KEY, {worker_id: now})
            pipe.zremrangebyscore(_INDEX_KEY, "-inf", now - 10 * LIFETIME_S)
            await pipe.execute()
            self._link.alive()
            await asyncio.sleep(HEARTBEAT_S)


async def list_workers(redis: Redis) -> list[RegisteredWorker]:
    """Workers whose entry is alive; at most _MAX_WORKERS, the latest first. Raises one of REDIS_ERRORS.

    An entry that no worker has written is left out and hides no other.
    """
    raw: Any = await redis.zrevrange(_INDEX_KEY, 0, _MAX_WORKERS - 1)
    pipe = redis.pipeline(transaction=False)
    for worker_id in raw:
        pipe.hmget(b"pd:w:" + worker_id, "instance", "address", "role")
    rows = await pipe.execute(raise_on_error=False) if raw else []
    found = (_read_entry(worker_id, row) for worker_id, row in zip(raw, rows, strict=True))
    return [worker for worker in found if worker is not None]


def _read_entry(worker_id: bytes, row: Any) -> RegisteredWorker | None:
    if not isinstance(row, list) or None in row:  # an error: the key is no hash
        return None
    try:
        fields = [value.decode() for value in (worker_id, *row)]
    except UnicodeDecodeError:
        return None
    _, _, address, _ = fields
    host, _, port = address.rpartition(":")
    if max(map(len, fields)) > _MAX_FIELD_LENGTH or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return RegisteredWorker(*fields)
