"""The process from which the workers of one machine are forked: what all of them import is imported once.

It says "ready" and then reads a line of JSON for each worker, {"flags", "environment", "log"}, answered with its pid.
It runs nothing of a worker itself, so that there is no thread, socket or lock in what a fork copies.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

from pagewire_core import tether
from pagewire_core.startup import process_began
from setproctitle import setproctitle

_PROGRAM = "pagewire-worker"


def main() -> None:
    began, parent = process_began(), os.getppid()
    setproctitle(f"{_PROGRAM} (imports)")  # the first call, and with the environment that the system gave
    gc.disable()  # imports make many objects and no garbage
    from pagewire_worker.main import main as work

    gc.freeze()  # a collection would write to every object, and the page it is on would be shared no more
    print("ready", flush=True)
    for line in sys.stdin:
        pid = _fork_for_parent()
        if pid:
            print(pid, flush=True)
            continue
        tether.end_with(parent)
        _become(**json.loads(line))
        gc.enable()
        work(began)
        return


def _fork_for_parent() -> int:
    """0 in a new process that is a child not of this one but of its parent, a subreaper; here the pid of the new one.

    So the parent sees how it ended, and this process need not live as long.
    """
    read, write = os.pipe()
    between = os.fork()
    if between:
        os.close(write)
        with open(read) as told:
            pid = int(told.read())
        os.waitpid(between, 0)
        return pid
    between = os.getpid()
    pid = os.fork()
    if pid:
        os.write(write, str(pid).encode())
        os._exit(0)
    os.close(read)
    os.close(write)
    while os.getppid() == between:
        time.sleep(0.001)
    return 0


def _become(flags: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """A process as the supervisor would have started it: session, environment, output and name of its own."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, log), (2, log)):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [_PROGRAM, *flags]
    setproctitle(" ".join(sys.argv))


if __name__ == "__main__":
    main()
