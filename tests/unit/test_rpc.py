"""The gRPC server that every service uses."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire_core.errors import StartupError
from pagewire_core.rpc import RpcServer, open_channel


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


async def test_a_burst_of_calls_is_answered_and_not_cancelled() -> None:
    """A router had a prompt embedded for each of 2000 inputs at once, and the worker's gRPC dropped some at random."""
    server = RpcServer()
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    async with open_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        calls = [health.Check(health_pb2.HealthCheckRequest()) for _ in range(3500)]
        time.sleep(0.5)  # the server's loop does something else while they come
        await asyncio.gather(*calls)
    await server.stop(0)
