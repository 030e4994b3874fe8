"""`pagewire key NAME`: a new API key, and its entry for --api-keys-file, which holds no secret."""

from __future__ import annotations

import argparse
import secrets
from typing import Any


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser("key", help="make an API key and its entry for --api-keys-file")
    parser.add_argument("name", metavar="NAME", help="who will use it")
    parser.add_argument("--tenant", help="whose cache and share of the queue it uses; default: NAME's own")
    parser.add_argument("--requests-per-minute", type=int, metavar="N")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N")
    parser.add_argument("--admin", action="store_true", help="may call what changes the server")
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    from pagewire_bridge.keys import digest_of  # pydantic and YAML: not wanted by the other commands

    secret = f"pw-{secrets.token_urlsafe(32)}"
    entry = {"name": args.name, "sha256": f'"{digest_of(secret)}"', "tenant": args.tenant}
    entry |= {"requests_per_minute": args.requests_per_minute, "tokens_per_minute": args.tokens_per_minute}
    entry |= {"admin": "true" if args.admin else None}
    lines = [f"{name}: {value}" for name, value in entry.items() if value is not None]
    print(f"# The key, shown only now: {secret}")
    print("- " + "\n  ".join(lines))
