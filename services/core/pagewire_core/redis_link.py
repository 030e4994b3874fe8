"""The one way to Redis: an asyncio client that fails fast, and a loop that outlives outages.

Redis is advisory. Everything that talks to it does so in a task of its own, built on `RedisLink`,
which retries with backoff and logs one line when Redis goes away and one when it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import structlog

from pagewire_core.errors import StartupError
from pagewire_core.redis_client import NoBackoff, Redis, RedisError, Retry, SSLConnection
from pagewire_core.tasks import is_cancelled

log = structlog.get_logger(__name__)

# AttributeError: redis-py's asyncio client can raise a bare one out of a connection that just died.
REDIS_ERRORS = (RedisError, OSError, TimeoutError, AttributeError, asyncio.IncompleteReadError)
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0
_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S = 1.0, 3.0


def open_redis(url: str) -> Redis:
    """A client without retries of its own; nothing is connected yet. Raises StartupError for a bad URL."""
    try:
        client = Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_ANSWER_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise StartupError(f"--redis-url {_without_password(url)} is not a URL like redis://host:6379/0") from error
    if url.startswith("rediss://"):
        client.connection_pool.connection_class = _TlsConnection
    return client


class _TlsConnection(SSLConnection):
    """Reads its files at each connection: a client may outlive its first certificate."""

    async def _connect(self) -> None:
        self.ssl_context.context = None
        await super()._connect()


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


async def ping(url: str) -> None:
    """Raises one of REDIS_ERRORS unless the server answers."""
    async with open_redis(url) as client:
        await client.ping()


async def require_reachable(url: str) -> None:
    """For the start of a process: raises StartupError unless a Redis answers at `url`."""
    try:
        await ping(url)
    except REDIS_ERRORS as error:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
        raise StartupError(
            f"cannot reach Redis at {where} ({type(error).__name__}); start it or correct --redis-url"
        ) from None


class RedisLink:
    """Runs one conversation with Redis for ever, again from its start after each failure.

    `purpose` names it in the log. `connected` says whether the last exchange went well.
    """

    def __init__(self, url: str, purpose: str) -> None:
        self.redis = open_redis(url)
        self._url = url
        self.connected = False
        self._purpose = purpose
        self._reported: bool | None = None

    async def run(self, converse: Callable[[Redis], Awaitable[None]]) -> None:
        """Calls `converse`, which calls `alive` after each answer and returns only by raising."""
        backoff = _MIN_BACKOFF_S
        try:
            while True:
                try:
                    await converse(self.redis)
                except REDIS_ERRORS as error:
                    backoff = _MIN_BACKOFF_S if self.connected else min(2 * backoff, _MAX_BACKOFF_S)
                    self._lost(error)
                    # A pooled connection to a server that died would only fail again.
                    await self.redis.aclose()
                    self.redis = open_redis(self._url)
                _end_if_cancelled()
                await asyncio.sleep(backoff)
        finally:
            await self.redis.aclose()

    def alive(self) -> None:
        """Notes that Redis answered. Ends a task that was cancelled."""
        _end_if_cancelled()
        self.connected = True
        if self._reported is not True:
            log.info("redis connected", purpose=self._purpose)
            self._reported = True

    def _lost(self, error: BaseException) -> None:
        self.connected = False
        if self._reported is not False:
            log.warning("redis is away; going on without it", purpose=self._purpose, error=type(error).__name__)
            self._reported = False


def _end_if_cancelled() -> None:
    """redis-py can lose a cancellation that comes while it reads; the task would then go on for ever."""
    if is_cancelled():
        raise asyncio.CancelledError
