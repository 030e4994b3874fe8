"""A process that works on what clients send and may die of it; the router's end is in bounded.py.

    stdin   length (4 bytes, little endian), job; ...
    stdout  ready: one byte; then for each: length, answer; ...

Ends when stdin does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

LENGTH = struct.Struct("<I")
CPU_S = 2  # of one job, at most


def serve(answer: Callable[[bytes], bytes], memory_bytes: int, stack_bytes: int) -> None:
    """Answers one job after the other. memory_bytes: more than this process has now, at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends us
    _bound_memory(memory_bytes)
    threading.stack_size(stack_bytes)
    thread = threading.Thread(target=_serve, args=(answer,))
    thread.start()
    thread.join()


def _serve(answer: Callable[[bytes], bytes]) -> None:
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"R")
    answers.flush()
    while header := jobs.read(LENGTH.size):
        job = jobs.read(*LENGTH.unpack(header))
        _bound_cpu()
        said = answer(job)
        answers.write(LENGTH.pack(len(said)) + said)
        answers.flush()


def _bound_cpu() -> None:
    """The kernel ends this process when the next job takes longer."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_S, hard))


def _bound_memory(num_bytes: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # macOS tells neither
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(OSError):
        os.nice(5)
