"""`pagewire role`: has a worker compute prompts, decode, or do both, without being started again."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc
from pagewire.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from pagewire_core.command_line import add_flags
from pagewire_core.errors import StartupError, from_rpc
from pagewire_core.flags import FLAGS, TLS_FLAGS, not_negative
from pagewire_core.rpc import open_channel
from pagewire_core.tls import WORKER, TlsFiles, tls_files


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "role",
        help="give a running worker another role",
        description="Has a worker take on another role at once. What runs of the old one when the time is up goes on "
        "elsewhere.",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="of the worker")
    parser.add_argument("role", choices=FLAGS["role"].choices)
    parser.add_argument(
        "--timeout", type=not_negative, default=FLAGS["graceful-termination-timeout"].default, metavar="S",
        help="seconds that what it gives up may go on there",
    )  # fmt: skip
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    asyncio.run(set_role(args.address, args.role, args.timeout, tls))


async def set_role(address: str, role: str, timeout_s: float, tls: TlsFiles | None) -> None:
    """Prints what still runs of the old role as it gets less. Raises StartupError if the worker does not do it."""
    async with open_channel(address, tls, WORKER) as channel:
        number = common_pb2.WorkerRole.Value(f"WORKER_ROLE_{role.upper()}")
        request = worker_pb2.SetRoleRequest(role=number, timeout_s=timeout_s)
        try:
            async for progress in worker_pb2_grpc.WorkerServiceStub(channel).SetRole(request):
                left = progress.num_running
                print(f"{left} running" if left else f"{address} has role {role}", flush=True)
        except grpc.aio.AioRpcError as error:
            raise StartupError(f"{address} did not take the role: {from_rpc(error).message}") from None
