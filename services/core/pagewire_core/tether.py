"""Runs a command that ends with its parent: `python tether.py PARENT_PID COMMAND...`.

Linux kills the command when the parent is gone, however the parent ended (PR_SET_PDEATHSIG survives
exec). Elsewhere it just runs the command. Uses the standard library alone, so that it costs no imports.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """The command, to be run by a child that is to end with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_with(parent: int) -> None:
    """This process is killed when `parent` ends, and ends at once if it has already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was asked for
        sys.exit(1)


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    end_with(parent)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
