"""A server under measurement: started, waited for, halted while others have their turn, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import psutil
from pagewire_cli.load.client import ServerUnfit
from pagewire_cli.ports import free_ports

from pagewire_bench.contestants import Contestant

_START_S = 600.0  # vLLM compiles at first start
_STOP_S = 30.0
_HALT_S = 5.0
_LOG_TAIL = 1500  # characters


class ServerProcess:
    """One contestant's processes, a process group of their own. Only one server of a machine should be awake."""

    def __init__(self, contestant: Contestant, directory: Path) -> None:
        self.contestant = contestant
        self._log = directory / f"{contestant.name.replace(' ', '-')}.log"
        self._popen: subprocess.Popen[bytes] | None = None
        self.base_url = ""

    def wake(self) -> None:
        """Starts it or lets it go on; returns once it answers. Raises ServerUnfit if it does not."""
        if self._popen is not None:
            _signal_group(self._popen, signal.SIGCONT)
        else:
            [port] = free_ports(1)
            self.base_url = f"http://127.0.0.1:{port}"
            environment = {**os.environ, **self.contestant.environment}
            with self._log.open("wb") as log:
                self._popen = subprocess.Popen(
                    [*self.contestant.command, str(port)], stdout=log, stderr=log, env=environment,
                    start_new_session=True,
                )  # fmt: skip
        self._wait_ready(self._popen)

    def rest(self) -> None:
        """Takes no CPU after this until it is woken."""
        if self._popen is not None and self.contestant.starts_slowly:
            _signal_group(self._popen, signal.SIGSTOP)
            _wait_halted(self._popen)
        else:
            self.stop()

    def stop(self) -> None:
        """Ends every process of it. Idempotent."""
        if self._popen is None:
            return
        self._popen.send_signal(signal.SIGTERM)
        _signal_group(self._popen, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_STOP_S)
        _signal_group(self._popen, signal.SIGKILL)  # what did not end, and what it left behind
        self._popen.wait()
        self._popen = None

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        body = {"model": self.contestant.model, "prompt": [64, 65, 66], "max_tokens": 1}
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerUnfit(f"{self.contestant.name} ended with {process.returncode}: {self._tail()}")
            try:
                answer = httpx.post(f"{self.base_url}/v1/completions", json=body, timeout=60.0, trust_env=False)
                if answer.status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise ServerUnfit(f"{self.contestant.name} did not answer for {_START_S:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_TAIL:]


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_halted(process: subprocess.Popen[bytes]) -> None:
    """A process that is running stops a moment after the signal."""
    parent = psutil.Process(process.pid)
    group = [parent, *parent.children(recursive=True)]
    deadline = time.monotonic() + _HALT_S
    while any(p.status() != psutil.STATUS_STOPPED for p in group) and time.monotonic() < deadline:
        time.sleep(0.01)
