"""The `pagewire` command: one small module per subcommand."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from pagewire_core.command_line import Parser
from pagewire_core.errors import StartupError

from pagewire_cli import (
    bench,
    certs,
    completion,
    drain,
    envoy_config,
    explain,
    key,
    role,
    serve,
    sizing,
    status,
    version,
)

_EXAMPLES = """\
`pagewire COMMAND --help` tells more. To begin with:
  pagewire serve                             the demo model on http://127.0.0.1:8000
  pagewire bench --num-prompts 64            how fast it is
  pagewire status --router HOST:PORT         what runs; `serve` prints the router's address"""


def main(argv: Sequence[str] | None = None, serve_defaults: Mapping[str, object] = serve.DEFAULTS) -> None:
    """Runs a subcommand. Exit code 1: it could not start (one sentence says why); 2: a wrong command line.

    serve_defaults: of flags of `serve`, where they are not the usual ones.
    """
    parser = Parser(
        prog="pagewire",
        usage="pagewire COMMAND [flags]",
        description="Disaggregated LLM serving: paged KV over the wire.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=version.installed_version())
    subcommands = parser.add_subparsers(required=True, title="commands", prog="pagewire", metavar="COMMAND")
    serve.add_subcommand(subcommands, defaults=serve_defaults)
    for command in (bench, status, explain, sizing, drain, role, certs, key, envoy_config, completion, version):
        command.add_subcommand(subcommands)
    parser.set_defaults(whole=parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
        _flush()
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left need not be told at the exit, either
        raise SystemExit(128 + signal.SIGPIPE) from None
    except StartupError as error:
        sys.stderr.write(f"pagewire: {error}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # before anything was started: there is nothing to stop
        raise SystemExit(130) from None


def _flush() -> None:
    """Raises BrokenPipeError here and not at the exit. A full disk is told there."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


if __name__ == "__main__":
    main()
