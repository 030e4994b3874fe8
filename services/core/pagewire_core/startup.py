"""The start of a process: how long its phases took, and what is done once it is over."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import psutil


class Timeline:
    """`mark` ends a phase. The first one began with the process itself, the interpreter's start included."""

    def __init__(self) -> None:
        self._last = time.time() - _age()
        self.phases: dict[str, float] = {}  # name -> seconds, in order

    def mark(self, name: str) -> None:
        now = time.time()
        self.phases[name] = round(max(now - self._last, 0.0), 3)
        self._last = now


def _age() -> float:
    """Seconds since the system made this process. psutil knows it to a second, Linux to a hundredth."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.time() - psutil.Process().create_time()


def freeze_heap() -> None:
    """Takes what the start has made out of garbage collection: walking it again and again stops every stream."""
    gc.collect()
    gc.freeze()
