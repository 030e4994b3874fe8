"""The gRPC server that every service uses."""

from __future__ import annotations

import asyncio
import socket

import pytest
from pagewire_core.errors import StartupError
from pagewire_core.rpc import RpcServer


async def test_stopping_twice_at_once_is_stopping_once() -> None:
    """In grpc.aio two concurrent stops end in a crash of the process: the later one uses a freed server."""
    for _ in range(20):
        server = RpcServer()
        await server.start("127.0.0.1", 0)
        await asyncio.gather(server.stop(0), server.stop(0), server.stop(0))
        await server.stop(0)


async def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{taken.getsockname()[1]}"):
            RpcServer().bind("127.0.0.1", taken.getsockname()[1])
