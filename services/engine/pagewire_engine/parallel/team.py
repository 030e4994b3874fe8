"""The other ranks of a worker, as rank 0 sees them: processes that live and die with it.

Three socket pairs to each, which have no name and no port: one for steps and their results, one for the keys of the
process groups, one for KV where memory cannot be mapped. Both ends see at once when the other is gone: a worker that
has lost a rank ends, and a rank that has lost its worker ends. A rank says every BEAT_S that it lives; a frozen one
would hold up every step.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog
from pagewire_core.tether import tethered

from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.peers import START_S, key_store

log = structlog.get_logger(__name__)

EXIT_CODE = 70  # of a worker that has lost a rank: what the others hold is of no use
BEAT_S, SILENT_S = 2.0, 20.0
_LOOKS = 10  # in the time that a rank may be silent


@dataclass(frozen=True)
class Member:
    """A rank: its process, and this end of the links to it."""

    process: subprocess.Popen[bytes]
    steps: socket.socket
    keys: socket.socket
    pages: socket.socket

    @property
    def links(self) -> tuple[socket.socket, ...]:
        return self.steps, self.keys, self.pages


class Team:
    """All ranks but this one. `store` reaches them and nobody else."""

    def __init__(self, model: Path, options: EngineOptions) -> None:
        """Starts the processes, from the thread whose end ends them: the process's first."""
        self._closing = False
        self._telling = threading.Lock()  # several watchers may tell one rank
        self.store = key_store(lambda key, value: self._tell(key, value, self._members.values()), options.num_ranks)
        self._members = {rank: _start(rank) for rank in range(1, options.num_ranks)}
        for member in self._members.values():
            hello = json.dumps({"model": str(model), "options": asdict(options)})
            messages.send(member.steps, {"hello": np.frombuffer(hello.encode(), np.uint8)})
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in self._members
        ]
        for watcher in self._watchers:
            watcher.start()

    @property
    def ranks(self) -> list[int]:
        return list(self._members)

    def send(self, arrays: messages.Arrays) -> None:
        for member in self._members.values():
            messages.send(member.steps, arrays)

    def receive(self, rank: int) -> messages.Arrays:
        return messages.receive(self._members[rank].steps)

    def receive_file(self, rank: int) -> int:
        """A file descriptor that the rank has sent."""
        _, [file], _, _ = socket.recv_fds(self._members[rank].steps, 1, 1)
        return file

    def pages(self, rank: int) -> socket.socket:
        """The link for KV to and from the rank."""
        return self._members[rank].pages

    def close(self) -> None:
        """Ends the ranks and waits for them. Idempotent."""
        self._closing = True
        for member in self._members.values():
            for link in member.links:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
        for member, watcher in zip(self._members.values(), self._watchers, strict=True):
            watcher.join()
            for link in member.links:
                link.close()

    def _watch(self, rank: int) -> None:
        """Passes the rank's keys on to all others until it is gone."""
        member = self._members[rank]
        limit_s = START_S
        with contextlib.suppress(OSError):  # TimeoutError is one
            while True:
                told = heard(member.keys, limit_s)
                limit_s = SILENT_S
                for key, value in told.items():
                    self.store.receive(key, value.tobytes())
                    self._tell(key, value.tobytes(), [m for r, m in self._members.items() if r != rank])
        if self._closing:
            member.process.wait()
            return
        self.store.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(1.0)  # it closed its end, so it is about to be gone
        member.process.kill()
        code = member.process.wait()
        log.critical("a rank of this worker has ended, and so does the worker", rank=rank, exit_code=code)
        sys.stdout.flush()
        os._exit(code if code > 0 else EXIT_CODE)

    def _tell(self, key: str, value: bytes, members: Iterable[Member]) -> None:
        for member in members:
            with self._telling, contextlib.suppress(OSError):  # its watcher sees that it is gone
                messages.send(member.keys, {key: np.frombuffer(value, np.uint8)})


def heard(link: socket.socket, limit_s: float) -> messages.Arrays:
    """The next message. Raises TimeoutError if none comes for so long while this process runs: a worker that was paused
    with all its ranks has lost none of them.
    """
    link.settimeout(limit_s / _LOOKS)
    for _ in range(_LOOKS):
        with contextlib.suppress(TimeoutError):
            link.recv(1, socket.MSG_PEEK)
            break
    else:
        raise TimeoutError
    return messages.receive(link)


def _start(rank: int) -> Member:
    pairs = [socket.socketpair() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(theirs).fileno() for _, theirs in pairs]
        command = (sys.executable, "-m", "pagewire_engine.parallel.rank", str(rank), *map(str, files))
        process = subprocess.Popen(tethered(command), stdin=subprocess.DEVNULL, pass_fds=files)
    return Member(process, *(ours for ours, _ in pairs))
