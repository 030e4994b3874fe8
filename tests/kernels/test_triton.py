"""Runs the Triton tests without a GPU, each file in a process with the TRITON_INTERPRET it needs.

Triton reads the variable when it is imported, its own functions included, and anything in this process may have
imported it already.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'pagewire[test]'"
)


# The longest first; "1": under the interpreter.
RUNS = {
    "sampling_kernels_vs_reference.py": "1",
    "kernels_vs_reference.py": "1",
    "step_kernels_vs_reference.py": "1",
    "linear_kernels_vs_reference.py": "1",
    "kernels_compile.py": None,
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[None]]]:
    """All of them, two at a time: they compute on one core each."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run_pytest, file, interpret) for file, interpret in RUNS.items()}


@pytest.mark.parametrize("kernels", ["sampling_kernels", "kernels", "step_kernels", "linear_kernels"])
def test_kernels_match_the_reference_under_the_interpreter(kernels: str, runs: dict[str, Future[None]]) -> None:
    runs[f"{kernels}_vs_reference.py"].result()


def test_kernels_compile_ahead_of_time(runs: dict[str, Future[None]]) -> None:
    runs["kernels_compile.py"].result()


def test_forcing_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    refused = run_python(CHOOSE, PAGEWIRE_KERNELS="triton")
    assert "only under TRITON_INTERPRET=1" in refused.stderr
    chosen = run_python(CHOOSE, PAGEWIRE_KERNELS="triton", TRITON_INTERPRET="1")
    assert chosen.stdout == "triton\n", chosen.stderr


def test_the_choice_is_logged_once_and_a_wrong_wish_is_refused() -> None:
    forced = run_python(CHOOSE, PAGEWIRE_KERNELS="torch")
    assert forced.stdout == "torch\n"
    assert forced.stderr.splitlines() == ["INFO:pagewire.kernels:cpu tensors: plain torch (forced by PAGEWIRE_KERNELS)"]
    assert "expected 'torch' or 'triton'" in run_python(CHOOSE, PAGEWIRE_KERNELS="cuda").stderr


def test_the_torch_path_does_not_import_triton() -> None:
    """A CPU machine need not have it installed; it costs seconds to import."""
    result = run_python("import sys; sys.modules['triton'] = None\n" + CHOOSE)
    assert result.stdout == "torch\n", result.stderr


CHOOSE = """
import logging
logging.basicConfig(level="INFO")
from pagewire_kernels import ops
ops.implementation("cpu")
print(ops.implementation("cpu").name)
"""


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=clean_environ() | environ, capture_output=True, text=True, check=False
    )


def run_pytest(file: str, interpret: str | None) -> None:
    """Shows the inner run's report on failure."""
    environ = clean_environ() | ({"TRITON_INTERPRET": interpret} if interpret else {})
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def clean_environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PAGEWIRE_KERNELS")}
