"""Processes of services that need not import anything: forked from one that has, which is most of a short test's time.

`python warm_start.py` is that one. It reads a line of JSON for each process to start, {"argv", "env", "log"}, and
answers with its pid; to {"wait": pid} it answers with the exit code once the process has ended. It never runs
anything of a service itself, so there is no thread, no socket and no gRPC in what a fork copies. What is forked has
its own session, environment and log, and runs the function that the console script of its name runs. Tests of
`pagewire serve`, and processes in network namespaces, start the console scripts themselves.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVICES = ("pagewire-worker", "pagewire-router", "pagewire-bridge")


class _Server:
    """The process that has imported everything, as the tests see it."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "false"}
        self._popen = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=env, text=True, bufsize=1, start_new_session=True)  # fmt: skip
        atexit.register(self._end)

    def ask(self, **what: Any) -> int:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.write(json.dumps(what) + "\n")
        return int(self._popen.stdout.readline())

    def _end(self) -> None:
        self._popen.communicate()


_server: _Server | None = None


class WarmProcess:
    """What `subprocess.Popen` would give, as far as tests use it."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        global _server
        _server = _server or _Server()
        self.pid = _server.ask(argv=list(argv), env=dict(env), log=str(log))
        self._ended = os.pidfd_open(self.pid)  # also of a process that has ended: its parent has not waited for it
        self.returncode: int | None = None

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            assert _server is not None
            self.returncode = _server.ask(wait=self.pid)
            os.close(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve() -> None:
    mains = {name: _main_of(name) for name in SERVICES}
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _become(mains[Path(asked["argv"][0]).name], **asked)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _main_of(name: str) -> Any:
    from importlib import import_module

    return import_module(f"{name.replace('-', '_')}.main").main


def _become(main: Any, argv: list[str], env: dict[str, str], log: str) -> None:
    """Runs the service to its end in this process, which has just been forked."""
    code = 1
    try:
        os.setsid()
        for number, file in ((0, os.devnull), (1, log), (2, log)):
            opened = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.pop(0)  # the tests' own modules
    _serve()
