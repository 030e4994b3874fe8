"""One child process: started, watched, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from pagewire_core.errors import StartupError
from pagewire_core.machine import oom_kills
from pagewire_core.tether import tethered

from pagewire_cli.plan import ServiceSpec
from pagewire_cli.zygote import Forked, Zygote

_POLL_S = 0.05
_TAIL_BYTES = 8192


class Service:
    """A process that may be started again after it has ended. Its output goes to a file that keeps every life."""

    def __init__(self, spec: ServiceSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.started_at = 0.0  # time.monotonic() of the current life
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._log_start = 0
        self._oom_kills = oom_kills()  # before the current life
        self._refused = ""  # why the system did not start it

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Starts the process, in a session of its own: Ctrl-C in the terminal is the supervisor's to pass on.

        What the system does not start now, for want of memory or of files, has ended at once.
        """
        self._oom_kills = oom_kills()
        self._process, self._refused = None, ""
        try:
            self.open_log()
            with self.log_path.open("ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    tethered(self.spec.command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    env=dict(self.spec.environment), start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._refused = f"the system does not start it: {error}"
        self.started_at = time.monotonic()

    def open_log(self) -> None:
        """Makes the file where it is not there, or not any more. Raises OSError."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.touch(0o600)  # the router's may have prompts in it

    async def spawn_from(self, zygote: Zygote) -> None:
        """The same without the imports, or the usual way if the zygote fails."""
        if await zygote.ready():
            self._process = zygote.fork(self.spec.flags, self.spec.environment, self.log_path)
            self.started_at = zygote.started_at
        if self._process is None:
            self.spawn()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def wait_ready(self) -> float:
        """Seconds from start to ready. Raises StartupError with the process's own words if it ends before."""
        while self.is_running():
            if await self.spec.is_ready(self.spec.address) and self.is_running():
                return time.monotonic() - self.started_at
            await asyncio.sleep(_POLL_S)
        raise StartupError(f"{self.spec.name} did not start: {self.last_words()} (log: {self.log_path})")

    async def wait_exit(self) -> None:
        while self.is_running():
            assert self._process is not None
            await _ended(self._process.pid)

    async def stop(self, grace_s: float) -> bool:
        """SIGTERM, and SIGKILL after `grace_s`; False if it took the latter. A process not running is left alone."""
        if self._process is None or not self.is_running():
            return True
        self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self.wait_exit()
            return True
        except TimeoutError:
            return False
        finally:
            self.kill()

    def kill(self) -> None:
        if self._process is not None and self.is_running():
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """Why the process ended, as far as its output or its exit status tells."""
        if self._refused:
            return self._refused
        assert self._process is not None and self._process.returncode is not None
        code = self._process.returncode
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return "killed by SIGKILL, it seems for want of memory"
        if code < 0:
            return f"killed by {_signal_name(-code)}"
        return self._last_sentence() or f"exited with code {code}"

    def _last_sentence(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:  # somebody has taken it away
            return ""
        ours = [line for line in lines if line.startswith("pagewire-")]  # how run_main words a StartupError
        return _readable((ours or lines or [""])[-1].strip())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of the real-time ones, the first and the last have names
        return f"signal {number}"


async def _ended(pid: int) -> None:
    """Returns when a child has ended, or after a moment where the system has no pidfds, or a sandbox forbids them."""
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):
        await asyncio.sleep(_POLL_S)
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _readable(line: str) -> str:
    """The event of a JSON log line; any other line as it is, without the program's name."""
    if line.startswith("{"):
        try:
            return str(json.loads(line).get("event", line))
        except json.JSONDecodeError:
            return line
    program, separator, sentence = line.partition(": ")
    return sentence if separator and program.startswith("pagewire-") else line
