"""Workers that lend each other cores, in any interleaving of their operations, with deaths at any moment."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).with_name("cores_exports.cpp")
HEADERS = Path(__file__).parents[2] / "kernels/pagewire_kernels/cpu"
CORES = {0: (0, 1), 1: (2,), 2: (5,)}  # of each worker
OWNER = {core: worker for worker, cores in CORES.items() for core in cores}
OPERATIONS = ("begin", "begin", "piece", "piece", "end", "end", "rest", "seize", "die")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cores") / "cores.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{HEADERS}", str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    library.cores_new.restype = ctypes.c_void_p
    return library


class Worker:
    """Does by hand what a step does: all own cores, then what others lend, looked at again after each piece of work."""

    def __init__(self, library: ctypes.CDLL, number: int, lines: ctypes.Array[ctypes.c_char]) -> None:
        self.library, self.number, self.lines = library, number, lines
        self.numbers = [*CORES[number], *(core for core in OWNER if OWNER[core] != number)]
        self.start()

    def start(self) -> None:
        """A new life; of an earlier one nothing is left but what it wrote to the lines."""
        count = len(self.numbers)
        array = (ctypes.c_int32 * count)(*self.numbers)
        made = self.library.cores_new(len(CORES[self.number]), array, count, self.lines)
        self.handle = ctypes.c_void_p(made)
        self.waits, self.runs = False, False
        self.used: set[int] = set()  # cores on which it computes

    def begin(self) -> None:
        if not self.runs:
            self.waits = bool(self.library.cores_ask(self.handle))
            if not self.waits:
                self._run()

    def seize(self) -> None:
        if self.waits:
            self.library.cores_seize(self.handle)
            self.waits = False
            self._run()

    def _run(self) -> None:
        self.runs, self.used = True, set(CORES[self.number])
        for i, core in enumerate(self.numbers):
            if OWNER[core] != self.number and self.library.cores_take(self.handle, i):
                self.used.add(core)

    def piece(self) -> None:
        for core in self.borrowed():
            if self.library.cores_is_wanted(self.handle, self.numbers.index(core)):
                self.give(core)

    def end(self) -> None:
        for core in self.borrowed():
            self.give(core)
        self.runs, self.used = False, set()

    def rest(self) -> None:
        if not self.runs and not self.waits:
            self.library.cores_rest(self.handle)

    def borrowed(self) -> list[int]:
        return [core for core in self.used if OWNER[core] != self.number]

    def give(self, core: int) -> None:
        self.library.cores_give(self.handle, self.numbers.index(core))
        self.used.discard(core)


class Host:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.lines = ctypes.create_string_buffer(64 * 8 + 64)
        offset = -ctypes.addressof(self.lines) % 64
        lines = (ctypes.c_char * (64 * 8)).from_buffer(self.lines, offset)
        self.workers = [Worker(library, number, lines) for number in CORES]
        self.seized: set[tuple[int, int]] = set()  # worker, core: it computes on a core that is no longer its own

    def do(self, number: int, operation: str) -> None:
        worker = self.workers[number]
        waiting = {w.number for w in self.workers if w.waits}
        before = worker.used
        if operation == "die":
            worker.start()
        else:
            getattr(worker, operation)()
        for core in worker.used - before:
            users = {w.number for w in self.workers if core in w.used} - {number}
            assert OWNER[core] == number or OWNER[core] not in waiting, "snatched from an owner that waits for it"
            assert not {user for user in users if (user, core) not in self.seized} or operation == "seize"
            self.seized |= {(user, core) for user in users}
        self.seized = {(user, core) for user, core in self.seized if core in self.workers[user].used}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(OPERATIONS)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_a_core_has_one_user_and_its_owner_has_it_after_a_piece_of_work(
    library: ctypes.CDLL, operations: list[tuple[int, str]]
) -> None:
    """But for one that was seized: there its old user stays until it looks."""
    host = Host(library)
    for number, operation in operations:
        host.do(number, operation)
    for worker in host.workers:
        host.do(worker.number, "piece")
    assert not host.seized
    for worker in host.workers:
        if worker.waits:  # whoever had its cores has looked, unless it is dead
            assert not worker.library.cores_ask(worker.handle) or any(op == "die" for _, op in operations)
            host.do(worker.number, "seize" if worker.library.cores_ask(worker.handle) else "begin")
        host.do(worker.number, "end")
        host.do(worker.number, "rest")
    host.do(0, "begin")
    assert host.workers[0].used == set(OWNER), "a core is lost"


def test_what_a_killed_worker_had_borrowed_is_seized(library: ctypes.CDLL) -> None:
    host = Host(library)
    borrower, owner, third = host.workers
    host.do(0, "begin")
    assert borrower.used == {0, 1, 2, 5}
    host.do(1, "begin")
    assert owner.waits and not third.library.cores_take(third.handle, third.numbers.index(2))
    host.do(1, "seize")
    assert owner.used == {2}
    host.do(1, "end")
    host.do(1, "rest")
    host.do(0, "end")  # it was not dead, only slow: the core is not given twice
    host.do(2, "begin")
    assert third.used == {5, 2}


@pytest.mark.timeout(60)
def test_a_thread_whose_core_others_keep_busy_sits_out_the_next_steps(library: ctypes.CDLL) -> None:
    """It would do next to nothing, and keep the system from giving the core to somebody else."""
    worker = Host(library).workers[0]
    note, gather = library.cores_note, library.cores_gather
    note.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    assert gather(worker.handle) == 4
    note(worker.handle, 1, 10_000_000, 6_000_000)  # the others did more of that step
    note(worker.handle, 1, 500_000, 500_000)  # nor is so short a one
    assert gather(worker.handle) == 4
    note(worker.handle, 1, 100_000_000, 90_000_000)  # its own second core, and one that is lent
    note(worker.handle, 2, 10_000_000, 9_000_000)
    assert gather(worker.handle) == 2
    while gather(worker.handle) == 2:
        time.sleep(0.01)
    while gather(worker.handle) < 4:
        time.sleep(0.01)


def test_a_new_life_gives_what_the_old_one_held(library: ctypes.CDLL) -> None:
    host = Host(library)
    host.do(0, "begin")
    host.do(0, "die")
    host.do(1, "begin")
    assert host.workers[1].used == set(OWNER)
