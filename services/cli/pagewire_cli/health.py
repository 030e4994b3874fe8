"""`pagewire health`: one service's health as an exit code, for the probes of containers."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from pagewire_core.errors import StartupError
from pagewire_core.flags import TLS_FLAGS, add_flags, seconds

_SERVICES = ("worker", "router", "bridge")


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "health",
        help="ask a service whether it is ready",
        description="Exit code 0: it takes requests. 1: it does not, as while it starts or drains. With TLS the "
        "certificate of any service will do, also the asked one's own.",
    )
    parser.add_argument("service", choices=_SERVICES)
    parser.add_argument("address", metavar="HOST:PORT", help="of the service; https://HOST:PORT for a bridge with TLS")
    parser.add_argument("--live", action="store_true", help="it need only answer: what drains is alive")
    parser.add_argument("--timeout", type=seconds, default=5.0, metavar="S", help="how long the answer may take")
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    from pagewire_core.tls import tls_files

    from pagewire_cli import readiness  # grpc: not wanted by the other commands

    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    address = args.address.removeprefix("http://")
    if args.service == "bridge":
        context = None
        if address.startswith("https://"):
            address, context = address.removeprefix("https://"), readiness.any_certificate(tls)
        status = asyncio.run(readiness.http_status(address, context, args.timeout))
        alive, ready = status is not None, status == 200
    else:
        serving = asyncio.run(readiness.grpc_serving(address, tls, args.service, args.timeout))
        alive, ready = serving is not None, bool(serving)
    if not (alive if args.live else ready):
        raise StartupError(f"the {args.service} at {args.address} {'is not ready' if alive else 'does not answer'}")
