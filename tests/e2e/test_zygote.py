"""Workers forked from a process that has imported everything: real ones, and what their supervisor sees of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pagewire_cli import zygote as forking
from pagewire_cli.plan import ServiceSpec
from pagewire_cli.ports import free_ports
from pagewire_cli.service import Service
from pagewire_cli.zygote import Forked, Zygote

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def flags(model: Path) -> list[str]:
    small = ["--kv-cache-memory-bytes=4M", "--max-model-len=256", "--threads=1", "--device=cpu"]
    return [f"--model={model}", f"--port={free_ports(1)[0]}", "--role=both", *small]


async def until(seen: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not seen():
            await asyncio.sleep(0.02)


async def ended(child: Forked) -> int | None:
    await until(lambda: child.poll() is not None)
    return child.returncode


async def test_it_is_our_child_with_a_session_an_output_and_a_name_of_its_own(
    zygote: Zygote, llama: Path, log: Path
) -> None:
    assert await zygote.ready()
    child = zygote.fork(flags(llama), {**os.environ, "PAGEWIRE_LOG_LEVEL": "info"}, log)
    assert child is not None
    await until(lambda: "worker ready" in log.read_text())
    process = psutil.Process(child.pid)
    assert process.ppid() == os.getpid() and os.getsid(child.pid) == child.pid
    assert " ".join(process.cmdline()).startswith(f"pagewire-worker --model={llama}")
    child.terminate()
    assert await ended(child) == 0
    assert "draining" in log.read_text()


async def test_its_settings_come_from_the_environment_that_it_is_given(zygote: Zygote, llama: Path, log: Path) -> None:
    assert await zygote.ready()
    child = zygote.fork(flags(llama), {**os.environ, "PAGEWIRE_MAX_NUM_SEQS": "none"}, log)
    assert child is not None and await ended(child) == 2
    assert "PAGEWIRE_MAX_NUM_SEQS is 'none'" in log.read_text()


async def test_a_signal_that_ended_it_is_known(zygote: Zygote, llama: Path, log: Path) -> None:
    assert await zygote.ready()
    child = zygote.fork(flags(llama), os.environ, log)
    assert child is not None
    child.kill()
    assert await ended(child) == -signal.SIGKILL
    child.terminate()  # nobody: the pid may be another's by now


@pytest.mark.parametrize("how", ["killed while it imports", "killed", "frozen"])
async def test_without_a_zygote_a_worker_starts_the_usual_way(
    how: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor waited for the word of a frozen one for ever, and heard no signal itself."""
    monkeypatch.setattr(forking, "_ANSWER_S", 0.5)
    broken = Zygote()
    assert how == "killed while it imports" or await broken.ready()
    broken._process.send_signal(signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
    command = (sys.executable, "-I", "-S", "-c", "import time; print('started', flush=True); time.sleep(600)")
    service = Service(ServiceSpec("both-0", "both", "127.0.0.1:1", command, dict(os.environ), None), log)  # type: ignore[arg-type]
    try:
        await service.spawn_from(broken)
        await until(lambda: "started" in log.read_text())
    finally:
        service.kill()
        broken.close()


async def test_where_orphans_cannot_be_adopted_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_adopt_orphans", lambda on: False)
    lonely = Zygote()
    assert not await lonely.ready()
    lonely.close()


def test_no_worker_outlives_a_supervisor_that_is_killed(llama: Path, log: Path) -> None:
    script = f"""
import asyncio, os, time
from pathlib import Path
from pagewire_cli.zygote import Zygote
zygote = Zygote()
assert asyncio.run(zygote.ready())
print(zygote.fork({flags(llama)!r}, os.environ, Path({str(log)!r})).pid, zygote._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        family = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        assert len(family) == 2 and not psutil.wait_procs(family, 30)[1]


@pytest.mark.parametrize(("gpus", "helps"), [([], True), (["0"], False)])
def test_it_is_for_workers_without_gpus(gpus: list[str], helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking.gpus, "seen", lambda device, environ: gpus)
    assert forking.helps(argparse.Namespace(device="auto")) is helps
