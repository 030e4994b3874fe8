"""The parser of every command: flags from the table, settings from environment and file, errors of one sentence.

A process adds the flags it takes with `add_flags(parser, names)`; the supervisor takes their union and passes each
process its own. Unknown flags are errors, and no flag is accepted that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pagewire_core import settings
from pagewire_core.flags import (
    FLAG_GROUPS,
    FLAGS,
    Flag,
    count,
    fraction,
    not_negative,
    origins,
    positive,
    seconds,
    several,
    tokens,
)
from pagewire_core.help_text import HelpFormatter
from pagewire_core.settings import Setting

PRECEDENCE = """\
Flags may also come from the environment (PAGEWIRE_MAX_NUM_SEQS=64) and from a YAML file (--config, lines
like max-num-seqs: 64). The command line wins, then the environment, then the file, then the default."""

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_SECRET = frozenset({"api-key"})
_PASSWORD = re.compile(r"(://)[^/?]*(?=@)|([?&]password=)[^&]*")  # redis-py takes either
_LONG_CHOICES = 40  # characters; beyond it they go into the text
_METAVARS: dict[Callable[[str], Any], str] = {
    positive: "N",
    tokens: "N",
    several: "N",
    count: "N",
    not_negative: "N",
    seconds: "S",
    fraction: "SHARE",
}
_HELP = frozenset({"-h", "--help"})


class Parser(argparse.ArgumentParser):
    """argparse without prefix matching, with one-sentence errors, exit code 2, and settings from elsewhere.

    `not_implemented` are names of flags that users of vLLM may expect: refused with a sentence of their own.
    """

    def __init__(
        self,
        environ: Mapping[str, str] = os.environ,
        not_implemented: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self._environ = environ
        self._not_implemented = not_implemented
        self._settable: dict[str, argparse.Action] = {}  # by long name
        self._takes_config = False

    def settable(self, action: argparse.Action) -> None:
        """The flag may also come from the environment and, where there is --config, from a file."""
        for option in action.option_strings:
            if option.startswith("--"):
                self._settable[option.removeprefix("--")] = action

    @property
    def names(self) -> list[str]:
        """Of the flags that the environment may set, without their other names."""
        return [name for name, action in self._settable.items() if action.option_strings[0] == f"--{name}"]

    def add_config(self) -> None:
        self._takes_config = True
        self.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of flags (max-num-seqs: 64)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = _with_dashes(sys.argv[1:] if args is None else args)
        if self._settable and not _HELP & set(given):  # --help tells of the defaults, and of nobody's keys
            self._take(self._from_file(given))
            self._take(settings.from_environment(self.names, self._environ))
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        parser: Parser = getattr(parsed, "parser", self)  # of the subcommand
        if unknown:
            parser.error(parser._unknown_argument(unknown[0]))
        parser._check_text(parsed)
        return parsed

    def _check_text(self, parsed: argparse.Namespace) -> None:
        """Names of files may be any bytes, but all else is sent or shown."""
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            try:
                value.encode() if isinstance(value, str) else None
            except UnicodeEncodeError:
                self.error(str(argparse.ArgumentError(action, "this is no UTF-8 text")))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """argparse takes -t for -tp even where nothing may be abbreviated."""
        return []

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def _from_file(self, given: Sequence[str]) -> list[Setting]:
        if not self._takes_config:
            return []
        finder = Parser(prog=self.prog, add_help=False)
        finder.add_argument("--config", default=self._environ.get(settings.CONFIG_VARIABLE))
        path = finder.parse_known_args(given)[0].config
        try:
            return settings.from_file(path) if path else []
        except ValueError as error:
            self.error(str(error))

    def _take(self, found: Iterable[Setting]) -> None:
        """As defaults, so that the command line wins; checked now, as argparse checks no choices of a default."""
        said: dict[str, str] = {}
        for setting in found:
            action = self._settable.get(setting.name)
            if action is None:
                self.error(f"{setting.source} is no flag: {self._unknown(setting.name)}")
            if action.dest in said:
                self.error(f"{said[action.dest]} and {setting.source} are the same flag; leave one out")
            said[action.dest] = setting.source
            self.set_defaults(**{action.dest: self._value(action, setting)})
            action.required = False

    def _value(self, action: argparse.Action, setting: Setting) -> Any:
        source, text = setting.source, setting.value
        if isinstance(text, list):
            text = json.dumps(text) if action.type is origins else ",".join(text)
        if action.nargs == 0:
            if text.lower() not in _SWITCH:
                self.error(f"{source} is {text!r}; write one of {', '.join(_SWITCH)}")
            return _SWITCH[text.lower()] != setting.name.startswith("no-")
        read: Callable[[str], Any] = action.type or str  # type: ignore[assignment]
        try:
            value = read(text)
        except argparse.ArgumentTypeError as error:
            self.error(f"{source} is {text!r}: {error}")
        except (TypeError, ValueError):
            self.error(f"{source} is {text!r}: not a valid {getattr(read, '__name__', 'value')}")
        if action.choices is not None and value not in action.choices:
            self.error(f"{source} is {text!r}; choose from {', '.join(map(str, action.choices))}")
        return value

    def _unknown_argument(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        return self._unknown(flag) if flag.startswith("-") else f"unexpected argument {argument!r}"

    def _unknown(self, flag: str) -> str:
        """Why a flag, or the name of one, is none; and which one may have been meant."""
        name = flag.lstrip("-").replace("_", "-")
        if name.removeprefix("no-") in self._not_implemented:
            return f"{flag} is not implemented yet"
        import difflib  # takes longer to import than any command line to parse

        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(name, known, n=1)
        dashes = "--" if flag.startswith("-") else ""
        return f"unknown flag {flag}" + (f"; did you mean {dashes}{near[0]}?" if near else "")


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """As vLLM's parser takes them: --max_model_len is --max-model-len. What follows -- is no flag."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            words[i] = flag.replace("_", "-") + equals + value
    return words


def add_flags(parser: Parser, names: Sequence[str]) -> None:
    """Adds the named flags, in groups."""
    for title, members in FLAG_GROUPS.items():
        group = parser.add_argument_group(title) if set(members) & set(names) else None
        for name in members:
            if group is not None and name in names:
                parser.settable(_add(group, name, FLAGS[name]))


class _Words(argparse.Action):
    """Words as one with commas, as environment and files have them, and to_command_line passes them on.

    Names the option in `greedy`: one of them may have been meant for an argument after it.
    """

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, ",".join(values))
        if len(values) > 1:
            namespace.greedy = option


def _add(group: argparse._ArgumentGroup, name: str, flag: Flag) -> argparse.Action:
    if flag.type is None:
        return group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=flag.default, help=flag.help
        )
    many = flag.choices is not None and len(",".join(flag.choices)) > _LONG_CHOICES
    return group.add_argument(
        f"--{name}", *flag.aliases, type=flag.type, default=flag.default,
        help=f"{flag.help}: {', '.join(flag.choices or ())}" if many else flag.help,
        metavar=name.rpartition("-")[2].upper() if many else None if flag.choices else _METAVARS.get(flag.type),
        choices=[flag.type(c) for c in flag.choices] if flag.choices else None,
        nargs="+" if flag.several else None, action=_Words if flag.several else "store",
    )  # fmt: skip


def to_command_line(values: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The named flags of `values` as arguments for another process; unset ones are left out."""
    line: list[str] = []
    for name in names:
        value = getattr(values, name.replace("-", "_"))
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif name == "allowed-origins":
            line += [f"--{name}={json.dumps(value)}"] if value else []
        elif isinstance(value, tuple):
            line += [f"--{name}={','.join(map(str, value))}"] if value else []
        elif value is not None:
            line.append(f"--{name}={value}")
    return line


def shown_flags(values: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """The named flags of `values` as they are typed, by name, for administrators: no key, no password in a URL."""
    shown: dict[str, str] = {}
    for word in to_command_line(values, [name for name in names if name not in _SECRET]):
        name, has_value, value = word.removeprefix("--").partition("=")
        if has_value:
            shown[name] = _PASSWORD.sub(r"\1\2***", value)
        else:
            shown[name.removeprefix("no-")] = str(not name.startswith("no-")).lower()
    return shown


def run_main(prog: str, main: Callable[[argparse.Namespace], None], names: Sequence[str], description: str) -> None:
    """Entry point of a service: parse, run, and end a StartupError with its sentence and exit code 1."""
    from pagewire_core.errors import StartupError

    # gRPC's own log says nothing that ours does not say better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # What we start is another program at once: gRPC's handlers of a fork are not for it, and run beside its threads.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    parser = Parser(prog=prog, usage=f"{prog} [flags]", description=description, epilog=PRECEDENCE)
    parser.add_config()
    add_flags(parser, names)
    try:
        main(parser.parse_args())
    except StartupError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        raise SystemExit(1) from None
