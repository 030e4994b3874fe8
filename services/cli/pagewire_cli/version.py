"""`pagewire version`."""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import Any


def installed_version() -> str:
    return importlib.metadata.version("pagewire")


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser("version", help="print the version")
    parser.set_defaults(parser=parser, run=lambda _args: print(installed_version()))
