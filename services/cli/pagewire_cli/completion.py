"""`pagewire completion SHELL`: a script that completes commands, flags and their values in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = """\
to have it in every new shell:
  bash   pagewire completion bash > ~/.local/share/bash-completion/completions/pagewire
  zsh    pagewire completion zsh > "${fpath[1]}/_pagewire"
  fish   pagewire completion fish > ~/.config/fish/completions/pagewire.fish
or in this one: source <(pagewire completion bash)"""
_FILES = frozenset({"FILE", "PATH"})  # metavars of what is a file, and of what may be one
_NAMES_OF_FILES = ("-keyfile", "-certfile", "-ca-certs", "-cert", "-key", "-ca", "-file", "-template")


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    """Whoever parses sets `whole` to the parser of the `pagewire` command."""
    parser = subcommands.add_parser(
        "completion",
        help="print a script that completes commands and flags",
        description="Prints a script for a shell.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(parser=parser, run=lambda args: print(script(args.whole, args.shell)))


def script(whole: argparse.ArgumentParser, shell: str) -> str:
    import shtab  # not wanted by the other commands

    for action in _actions(whole):
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in _FILES or _named_like_a_file(action):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Of the parser and of those of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _named_like_a_file(action: argparse.Action) -> bool:
    return any(option.startswith("--") and option.endswith(_NAMES_OF_FILES) for option in action.option_strings)
