"""`pagewire key NAME`: a new API key, and its entry for --api-keys-file, which holds no secret."""

from __future__ import annotations

import argparse
import secrets
from typing import Any

from pagewire_core.errors import StartupError
from pagewire_core.flags import positive


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser("key", help="make an API key and its entry for --api-keys-file")
    parser.add_argument("name", metavar="NAME", help="who will use it")
    parser.add_argument("--tenant", help="whose cache and share of the queue it uses; default: NAME's own")
    parser.add_argument("--requests-per-minute", type=positive, metavar="N")
    parser.add_argument("--tokens-per-minute", type=positive, metavar="N")
    parser.add_argument("--admin", action="store_true", help="may call what changes the server")
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    # Not wanted by the other commands.
    import yaml
    from pagewire_bridge.keys import ApiKey, digest_of
    from pydantic import ValidationError

    secret = f"pw-{secrets.token_urlsafe(32)}"
    try:
        own = {} if args.tenant is None else {"tenant": args.tenant}
        key = ApiKey(
            name=args.name, sha256=digest_of(secret), admin=args.admin, requests_per_minute=args.requests_per_minute,
            tokens_per_minute=args.tokens_per_minute, **own,
        )  # fmt: skip
    except ValidationError:
        raise StartupError("NAME and --tenant are 1 to 64 letters, digits, dots, dashes and underscores") from None
    print(f"# The key, shown only now: {secret}")
    print(yaml.safe_dump([key.model_dump(exclude_defaults=True)], sort_keys=False), end="")
