"""How --help looks: names on one line, the text beside them with the default, no wider than the terminal or 100."""

from __future__ import annotations

import argparse
import shutil

_WIDEST = 100
_COLUMN = 28  # where the text begins


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a default unless there is none; what its absence means is in the help itself."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, max_help_position=_COLUMN, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = (action.help or "").replace(" (default: %(default)s)", "")  # Python 3.11's own, for switches
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} (default: {'on' if action.default else 'off'})"
        if action.nargs == 0 or action.default in (None, "", (), argparse.SUPPRESS) or not action.option_strings:
            return text
        default = f"{action.default:g}" if isinstance(action.default, float) else "%(default)s"
        return f"{text} (default: {default})"

    def _format_action(self, action: argparse.Action) -> str:
        """A list of commands without a line for what all of them are."""
        if isinstance(action, argparse._SubParsersAction):
            return "".join(self._format_action(command) for command in action._get_subactions())
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """--tensor-parallel-size, -tp SIZE: the value once, and not after every name."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()  # --download-dir DIR
