"""`pagewire drain`: has a worker take nothing new, and waits until nothing runs on it."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from pagewire_core.command_line import add_flags
from pagewire_core.errors import StartupError, from_rpc
from pagewire_core.flags import FLAGS, TLS_FLAGS, not_negative
from pagewire_core.rpc import open_channel
from pagewire_core.tls import WORKER, TlsFiles, tls_files


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "drain",
        help="empty a worker before it is stopped",
        description="Has a worker take nothing new. What still runs when the time is up goes on elsewhere.",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="of the worker")
    parser.add_argument(
        "--timeout", type=not_negative, default=FLAGS["graceful-termination-timeout"].default, metavar="S",
        help="seconds that running requests may go on there",
    )  # fmt: skip
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    asyncio.run(drain(args.address, args.timeout, tls))


async def drain(address: str, timeout_s: float, tls: TlsFiles | None) -> None:
    """Prints what still runs as it gets less. Raises StartupError if the worker cannot be reached."""
    async with open_channel(address, tls, WORKER) as channel:
        request = worker_pb2.DrainRequest(timeout_s=timeout_s)
        try:
            async for progress in worker_pb2_grpc.WorkerServiceStub(channel).Drain(request):
                left = progress.num_running
                print(f"{left} running" if left else f"{address} is drained", flush=True)
        except grpc.aio.AioRpcError as error:
            raise StartupError(f"{address} was not drained: {from_rpc(error).message}") from None
