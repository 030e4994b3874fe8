"""`pagewire certs`: certificates for mutual TLS where there is no cert-manager or the like."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pagewire_core.errors import StartupError
from pagewire_core.flags import positive


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "certs",
        help="make certificates for TLS in development",
        description="Makes an authority, once, and a certificate for each role. Run again, it replaces the "
        "certificates: running services take the new ones up by themselves.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where they go; only its owner may read it")
    parser.add_argument(
        "--hosts", default="", help="names and addresses of the redis and edge servers beside loopback, comma-separated"
    )
    parser.add_argument("--days", type=positive, default=365, help="how long they are valid")
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    from pagewire_core.tls import ROLES

    from pagewire_cli import authority  # cryptography and grpc: not wanted by the other commands

    directory = args.directory
    hosts = [host.strip() for host in args.hosts.split(",") if host.strip()]
    try:
        authority.write_certificates(authority.Authority.kept_in(directory), directory, hosts, args.days)
    except (OSError, ValueError, OverflowError) as error:  # the last of a date beyond all calendars
        raise StartupError(f"cannot make certificates in {directory}: {error}") from None
    print(f"{directory}: ca.crt, and NAME.crt and NAME.key for {', '.join((*ROLES, *authority.SERVERS))}")
    print(
        f"A worker takes --tls-ca {directory}/ca.crt --tls-cert {directory}/worker.crt --tls-key {directory}/worker.key"
    )
