"""Workers that need not import anything, as they are forked from a process that has: on Linux, and without GPUs."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pagewire_core.tether import tethered

from pagewire_cli import gpus

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02
_ANSWER_S = 5.0  # a fork takes milliseconds


class Forked:
    """A child of this process that it has not started itself: as much of `subprocess.Popen` as `Service` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def helps(args: argparse.Namespace) -> bool:
    """Whether the workers of settled arguments of `serve` can be forked: what CUDA has begun cannot."""
    return sys.platform == "linux" and not gpus.seen(args.device, os.environ)


class Zygote:
    """pagewire_worker.zygote until it is closed. What it has forked are children of this process, and stay."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        # None: not known yet. What it forks must become a child of this process.
        self._is_ready: bool | None = None if _adopt_orphans(True) else False
        command = (sys.executable, "-P", "-m", "pagewire_worker.zygote")
        # One thread: workers set the number of theirs, and threads do not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            tethered(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()
            _adopt_orphans(False)

    async def ready(self) -> bool:
        """Returns when it has imported everything, or has failed to: then False."""
        assert self._process.stdout is not None
        while self._is_ready is None:
            if select.select([self._process.stdout], [], [], 0)[0]:
                self._is_ready = self._process.stdout.readline() == b"ready\n"
            else:
                await asyncio.sleep(_POLL_S)
        return self._is_ready

    def fork(self, flags: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked | None:
        """A worker, or None if it cannot be had. Takes some milliseconds once `ready`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"flags": list(flags), "environment": dict(environment), "log": str(log)}
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([self._process.stdout], [], [], _ANSWER_S)[0]:
            self._process.kill()  # stands still, and nobody could stop this process meanwhile
        pid = self._process.stdout.readline()
        return Forked(int(pid)) if pid else None


def _adopt_orphans(on: bool) -> bool:
    """Whether a descendant that loses its parent is to become a child of this process; False if that cannot be had."""
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0)
