from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from fakes import RedisServer
from pagewire_core import registry
from pagewire_core.errors import StartupError
from pagewire_core.redis_link import open_redis
from pagewire_core.registry import RegisteredWorker, Registration, list_workers

FIELDS = {"worker_id": "w", "instance": "i", "address": "127.0.0.1:1", "role": "prefill", "port": 1}
ENTRY = RegisteredWorker("w", "i", "127.0.0.1:1", "prefill")


@contextlib.asynccontextmanager
async def running(registration: Registration) -> AsyncIterator[None]:
    task = asyncio.create_task(registration.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def listed(server: RedisServer) -> list[RegisteredWorker]:
    redis = open_redis(server.url)
    try:
        return await list_workers(redis)
    finally:
        await redis.aclose()


async def wait_listed(server: RedisServer, expected: list[RegisteredWorker]) -> None:
    async with asyncio.timeout(20):
        while await listed(server) != expected:
            await asyncio.sleep(0.02)


async def test_a_worker_is_listed_until_it_leaves(redis_server: RedisServer) -> None:
    registration = Registration(redis_server.url, FIELDS)
    assert await listed(redis_server) == []
    async with running(registration):
        await wait_listed(redis_server, [ENTRY])
    await registration.deregister()
    assert await listed(redis_server) == []


async def test_an_entry_ends_with_its_heartbeats(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LIFETIME_S", 2.0)
    async with running(Registration(redis_server.url, FIELDS)):
        await wait_listed(redis_server, [ENTRY])
    await wait_listed(redis_server, [])


async def test_a_late_goodbye_leaves_the_successor_listed(redis_server: RedisServer) -> None:
    async with running(Registration(redis_server.url, {**FIELDS, "instance": "next"})):
        await wait_listed(redis_server, [RegisteredWorker("w", "next", "127.0.0.1:1", "prefill")])
        await Registration(redis_server.url, FIELDS).deregister()
        assert len(await listed(redis_server)) == 1


async def test_a_worker_lists_itself_again_after_redis_was_away(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "HEARTBEAT_S", 0.1)
    async with running(Registration(redis_server.url, FIELDS)):
        await wait_listed(redis_server, [ENTRY])
        redis_server.kill()
        await asyncio.sleep(0.3)
        redis_server.start()
        await wait_listed(redis_server, [ENTRY])


async def test_saying_goodbye_to_a_redis_that_is_gone_is_no_error(redis_server: RedisServer) -> None:
    redis_server.kill()
    await Registration(redis_server.url, FIELDS).deregister()


def test_a_bad_url_is_told_without_its_password() -> None:
    with pytest.raises(StartupError, match="is not a URL") as caught:
        open_redis("http://user:secret@host/0")
    assert "secret" not in str(caught.value)
