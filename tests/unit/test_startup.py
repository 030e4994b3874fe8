"""The timeline of a start, seen from a process that has just begun."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pagewire_cli.serve import demo_model


def test_the_first_phase_begins_with_the_process_itself() -> None:
    """The interpreter's start and the imports are most of what a user waits for."""
    code = "import time; time.sleep(0.3); from pagewire_core.startup import Timeline; t = Timeline(); t.mark('a')"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", f"{code}; print(t.phases['a'])"], capture_output=True, text=True)
    elapsed = time.monotonic() - before
    assert 0.3 <= float(done.stdout) <= elapsed + 0.02


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--kv-cache-memory-bytes=100", "raise --kv-cache-memory-bytes"), ("--lanes=nccl", "nccl does not work")],
)
def test_a_worker_refused_after_its_threads_have_begun_leaves_no_end_to_the_interpreter(flag: str, words: str) -> None:
    """It would end threads in the middle of compiled code, which now and then aborts: the exit code is then not 1."""
    at_exit = "import atexit; atexit.register(print, 'ended by the interpreter')"
    code = f"{at_exit}; from pagewire_worker.main import main; main()"
    command = [sys.executable, "-P", "-c", code, f"--model={demo_model()}", "--role=both", "--port=0", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lanes=tcp", "tcp needs --tls-cert"), ("--lanes=udp", "is not a lane"), ("--host=0.0.0.0", "can dial"),
        (None, "no model: give --model"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_the_model_is_loaded(flag: str | None, words: str, tmp_path: Path) -> None:
    """None: without a model."""
    code = "from pagewire_worker.main import main; main()"
    flags = [f"--model={tmp_path}", flag] if flag else []
    command = [sys.executable, "-P", "-c", code, "--port=0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1]
