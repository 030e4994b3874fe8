"""How long a worker waits for a word of a rank."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.team import heard

LIMIT_S = 1.0
WORKER = """
import socket, sys
from pagewire_engine.parallel.team import heard
print("listens", flush=True)
try:
    heard(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
    print("heard")
except TimeoutError:
    print("silent")
"""


@pytest.fixture
def links() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_word_is_heard_whole(links: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = links
    messages.send(theirs, {"k": np.arange(3)})
    messages.send(theirs, {})
    assert heard(ours, LIMIT_S)["k"].tolist() == [0, 1, 2] and heard(ours, LIMIT_S) == {}


def test_silence_ends_and_so_does_a_link_whose_other_end_is_gone(links: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = links
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        heard(ours, LIMIT_S)
    assert LIMIT_S * 0.9 < time.monotonic() - began < 5 * LIMIT_S
    theirs.close()
    with pytest.raises(ConnectionError):
        heard(ours, LIMIT_S)


@pytest.mark.parametrize(("speaks", "outcome"), [(True, "heard"), (False, "silent")])
def test_a_pause_of_the_worker_is_no_silence_of_its_ranks(
    speaks: bool, outcome: str, links: tuple[socket.socket, socket.socket]
) -> None:
    """One that was paused with its ranks, as containers and virtual machines are, ended when it went on."""
    ours, theirs = links
    command = (sys.executable, "-c", WORKER, str(ours.fileno()), str(LIMIT_S))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[ours.fileno()]) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "listens\n"
        worker.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * LIMIT_S)
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.2 * LIMIT_S)  # a rank that was paused says again that it lives
        if speaks:
            messages.send(theirs, {})
        assert worker.stdout.read() == f"{outcome}\n"
