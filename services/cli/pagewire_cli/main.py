"""The `pagewire` command: one small module per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pagewire_core.errors import StartupError
from pagewire_core.flags import Parser

from pagewire_cli import certs, drain, envoy_config, explain, key, role, serve, status, version


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand. Exit code 1: it could not start (one sentence says why); 2: a wrong command line."""
    parser = Parser(prog="pagewire", description="Disaggregated LLM serving: paged KV over the wire.")
    parser.add_argument("--version", action="version", version=version.installed_version())
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve.add_subcommand(subcommands)
    drain.add_subcommand(subcommands)
    role.add_subcommand(subcommands)
    explain.add_subcommand(subcommands)
    status.add_subcommand(subcommands)
    certs.add_subcommand(subcommands)
    key.add_subcommand(subcommands)
    envoy_config.add_subcommand(subcommands)
    version.add_subcommand(subcommands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(serve.explain_unknown(unknown[0]))
    try:
        args.run(args)
    except StartupError as error:
        sys.stderr.write(f"pagewire: {error}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # before anything was started: there is nothing to stop
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
