"""Faults on demand, for tests: what a process does to itself when it comes to a named point.

`main` of a service arms it from the environment, PAGEWIRE_FAULTS=RANK@DIRECTORY; no flag, message or request
can. A fault is a file in DIRECTORY with the name `stage:rank:action`, where the rank `decode` means every
`decode-N`. The first process of that rank that comes to the point of that stage removes the file and acts; whoever
made the file sees by its going that it was done. The file may say `after=N` (N passes first), `times=N` and
`seconds=S` (for delay, 1 by default).

    kill, stop     SIGKILL or SIGSTOP to itself
    delay          stands still for some seconds, with everything that this thread serves
    refuse         raises Overloaded
    any other      is returned, for the point itself to do (drop, duplicate, flip)
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

from pagewire_core.errors import Overloaded

VARIABLE = "PAGEWIRE_FAULTS"

# How to call it: `faults.point` is looked up at each call, so that until it is armed a point costs one empty call.
_directory = Path()
_rank = ""
_passes: Counter[tuple[str, int]] = Counter()  # by the fault's name and when it was asked for


def point(stage: str) -> str:
    """Here a process may fail. Returns what the caller is to do wrong; empty: nothing."""
    return ""


def arm(setting: str | None) -> None:
    """From now on points look for faults, if `setting` (of the environment) says where."""
    global point, _directory, _rank
    if setting:
        _rank, _, directory = setting.partition("@")
        _directory = Path(directory)
        point = _armed_point


def _armed_point(stage: str) -> str:
    asked = ""
    for name in os.listdir(_directory):
        if name.startswith(stage + ":"):
            _, rank, action = name.split(":")
            options = _claim(name) if rank in (_rank, _rank.partition("-")[0]) else None
            if options is not None:
                asked = _act(stage, action, options) or asked
    return asked


def _claim(name: str) -> dict[str, str] | None:
    """The fault's options if it is due and this thread is the one to do it."""
    file = _directory / name
    try:
        options = dict(word.split("=") for word in file.read_text().split())
        # Another process may have taken an earlier fault of this name: what was counted of that is not of this one.
        fault = name, file.stat().st_mtime_ns
        _passes[fault] += 1
        due = _passes[fault] - int(options.get("after", 0))
        if due == int(options.get("times", 1)):
            file.unlink()
            del _passes[fault]
    except FileNotFoundError:  # another thread or process did it
        return None
    return options if due > 0 else None


def _act(stage: str, action: str, options: dict[str, str]) -> str:
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    elif action == "delay":
        time.sleep(float(options.get("seconds", 1)))
    elif action == "refuse":
        raise Overloaded(f"a fault was injected at {stage}", retry_after_s=1.0)
    else:
        return action
    return ""
