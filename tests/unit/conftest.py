"""Fixtures that several unit tests share."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from fakes import RedisServer
from scripted_router import Bridge, running_bridge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Bridge]:
    """A bridge before a scripted router, for all tests of a file; one that needs it otherwise has its own."""
    async with running_bridge() as bridge:
        yield bridge


@pytest.fixture
def bridge(running: Bridge) -> Bridge:
    """It, with nothing left of the test before."""
    running.router.reset()
    return running


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Of a real server, for all tests of a file."""
    server = RedisServer()
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """As in a service: every end of a pair looks for garbage, which in all that tests import takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
