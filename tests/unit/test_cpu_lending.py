"""Two workers' steps on cores that they lend each other: the same tokens, and no core is lost with its borrower."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from pagewire_core.errors import StartupError
from pagewire_core.machine import available_cpus
from pagewire_core.model_dir import resolve_model
from pagewire_engine.batch import Batch
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.loader import load
from pagewire_engine.options import EngineOptions
from pagewire_engine.sampler import SampleRow
from pagewire_engine.sampling_params import SamplingParams

CPUS = available_cpus()
LENGTH = 128
GREEDY = SamplingParams(temperature=0.0)
TEXT = np.random.default_rng(0).integers(3, tiny_models.VOCAB, LENGTH).tolist()

pytestmark = pytest.mark.skipif(sys.platform != "linux" or len(CPUS) < 2, reason="needs Linux and two cores")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def no_step_is_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These models are so tiny that their steps would run on one thread."""
    monkeypatch.setattr("pagewire_engine.cpu.runner.SMALL_STEP", 0)
    yield


def make_runner(path: Path, core: int, file: Path | None) -> CpuRunner:
    """A runner that owns the core at that place of CPUS; alone on it without a file."""
    options = EngineOptions(
        max_model_len=LENGTH, kv_cache_memory_bytes=4 << 20, threads=1, cpus=CPUS[core : core + 1],
        cpu_lending=file and str(file), dtype="bfloat16",
    )  # fmt: skip
    runner = load(resolve_model(str(path)), options).runner
    assert isinstance(runner, CpuRunner)
    return runner


def prompt(runner: CpuRunner, length: int) -> int:
    """The token that follows the first `length` of TEXT."""
    batch = Batch(
        scheduled=(),
        input_ids=np.array(TEXT[:length], np.int32),
        positions=np.arange(length, dtype=np.int32),
        query_start=np.array([0, length], np.int32),
        seq_lens=np.array([length], np.int32),
        num_decode=0,
        tables=np.arange(LENGTH // 16, dtype=np.int32)[None],
        seats=np.zeros(1, np.int32),
        table_changes=(0,),
        sample_from=np.array([length - 1], np.int32),
        sample_rows=(SampleRow(GREEDY, 0, TEXT[:length], 1),),
        copies=(),
        allowed=None,
    )
    return runner.launch(batch).tokens()[0].token


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.timeout(120)
def test_tokens_are_the_same_while_cores_come_and_go(model: Path, tmp_path: Path) -> None:
    """Each rests now and then; so each borrows, and each wants its core back in the middle of the other's steps."""
    expected = {length: prompt(make_runner(model, 0, None), length) for length in (1, 3, 40, 100)}
    runners = [make_runner(model, core, tmp_path / "cores") for core in (0, 1)]
    wrong: list[tuple[int, int]] = []
    done = threading.Event()

    def work(runner: CpuRunner, seed: int) -> None:
        lengths = np.random.default_rng(seed).choice(list(expected), 5000)
        for i, length in enumerate(itertools.cycle(lengths.tolist())):
            if (token := prompt(runner, length)) != expected[length]:
                wrong.append((length, token))
            if i % 3 == 0:
                runner.rest()
                time.sleep(0.0005)
            if done.is_set():
                return

    workers = [threading.Thread(target=work, args=(runner, seed)) for seed, runner in enumerate(runners)]
    for worker in workers:
        worker.start()
    # On a busy machine a thread that borrows sits out most of the time.
    until(lambda: min(r.cores.borrowed for r in runners) > 2 and sum(r.cores.returned for r in runners) > 2, 100.0)
    done.set()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.timeout(120)
def test_a_borrower_that_is_killed_does_not_keep_the_core(model: Path, tmp_path: Path) -> None:
    """Killed or halted in the middle of a step, it can never give back; the owner's next step ran nevertheless."""
    file = tmp_path / "cores"
    owner, borrower = make_runner(model, 1, file), make_runner(model, 0, file)
    expected = prompt(make_runner(model, 1, None), 100)
    child = os.fork()
    if not child:
        for _ in range(10**5):
            prompt(borrower, 100)
        os._exit(0)
    try:
        until(lambda: _is_halted_with(child, file, CPUS[1]))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(3):
        assert prompt(owner, 100) == expected and _user(file, CPUS[1]) == CPUS[1] + 1
        owner.rest()


def _is_halted_with(pid: int, file: Path, core: int) -> bool:
    """Halts the process; lets it go on if it does not use the core just now."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    if _user(file, core) == CPUS[0] + 1:
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _user(file: Path, core: int) -> int:
    """Who uses a core now, by the file."""
    return int(np.fromfile(file, np.uint32).reshape(-1, 16)[core, 1])


def test_a_file_that_cannot_be_used_costs_only_the_lending(model: Path, tmp_path: Path) -> None:
    runner = make_runner(model, 0, tmp_path / "nowhere" / "cores")
    assert prompt(runner, 40) == prompt(make_runner(model, 0, None), 40)
    assert runner.cores.borrowed == 0


def test_lending_needs_cores_of_ones_own(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--cpu-lending needs --cpus"):
        load(resolve_model(str(model)), EngineOptions(cpu_lending=str(tmp_path / "cores")))
