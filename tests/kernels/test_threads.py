"""Threads that do the phases of a step: every item once, no phase before the last is over, and nobody after the end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("threads_program.cpp")
HEADERS = Path(__file__).parents[2] / "kernels/pagewire_kernels/cpu"
SANITIZERS = ("none", "thread", "address,undefined")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "steps"
    sanitizer = [] if request.param == "none" else [f"-fsanitize={request.param}"]
    command = ["g++", "-std=c++20", "-O1", *sanitizer, "-pthread", f"-I{HEADERS}", str(PROGRAM), "-o", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this compiler has no sanitizer {request.param}")
    return path


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def helped(program: Path, own: int, lent: int, steps: int) -> int:
    """Pieces that other threads than the caller's did. The program fails where anything was wrong."""
    command = [str(program), str(own), str(lent), str(steps)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr[:2000]
    done, pieces = map(int, run.stdout.split())
    assert done == steps
    return pieces


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("own", "lent"), [(2, 0), (4, 0), (1, 2), (2, 3)])
def test_every_item_of_every_phase_is_done_once(program: Path, own: int, lent: int) -> None:
    assert helped(program, own, lent, 1000)


@pytest.mark.timeout(120)
def test_threads_that_others_take_the_cores_from_hold_nothing_up_for_good(program: Path) -> None:
    with busy_processes(3):
        helped(program, 2, 1, 300)


def test_one_thread_does_it_all_alone(program: Path) -> None:
    assert helped(program, 1, 0, 300) == 0
