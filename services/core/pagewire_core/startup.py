"""The start of a process: how long its phases took, what it needs of the system, and what is done once it is over."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from pathlib import Path

import psutil

_CONNECTIONS = 32768
_NEW_OBJECTS = 10_000  # between two collections of the youngest; Python: 700


class Timeline:
    """`mark` ends a phase. The first one began at `began`, or with the process, the interpreter's start included."""

    def __init__(self, began: float | None = None) -> None:
        self._last = process_began() if began is None else began
        self.phases: dict[str, float] = {}  # name -> seconds, in order

    def mark(self, name: str) -> None:
        now = time.time()
        self.phases[name] = round(max(now - self._last, 0.0), 3)
        self._last = now


def process_began() -> float:
    """When the system made this process, as time.time(). psutil knows it to a second, Linux to a hundredth."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + started
    except (OSError, AttributeError):
        return psutil.Process().create_time()


def allow_connections() -> None:
    """Raises this process's limit of open files, of which each is one, as far as its user may: shells begin with 1024
    on Linux and 256 on macOS, and who comes after that is cut without a word.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, _CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def freeze_heap() -> None:
    """Takes what the start has made out of garbage collection: walking it again and again stops every stream.

    What comes later is looked at less often than Python would, which took 5 % of the time of a busy router and bridge.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
