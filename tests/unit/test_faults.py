"""Faults happen where and as often as they are asked for, and only in a process that was started for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagewire_core import faults
from pagewire_core.errors import Overloaded


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("point", "_rank", "_directory"):
        monkeypatch.setattr(faults, name, getattr(faults, name))
    faults.arm(f"decode-0@{tmp_path}")
    yield tmp_path
    faults._passes.clear()


def test_without_the_environments_word_a_point_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bind::refuse").touch()
    faults.arm(None)
    faults.arm("")
    assert faults.point("bind") == ""
    assert (tmp_path / "bind::refuse").exists()


def test_a_fault_happens_once_after_so_many_passes_to_the_rank_it_names(armed: Path) -> None:
    (armed / "bind:decode-1:drop").touch()
    (armed / "bind:decode-0:drop").write_text("after=2")
    (armed / "bind-other:decode-0:flip").touch()
    assert [faults.point("bind") for _ in range(5)] == ["", "", "drop", "", ""]
    assert sorted(file.name for file in armed.iterdir()) == ["bind-other:decode-0:flip", "bind:decode-1:drop"]


def test_a_fault_may_be_for_a_whole_role_and_happen_several_times(armed: Path) -> None:
    (armed / "bind:decode:drop").write_text("after=1 times=2")
    (armed / "bind:prefill:flip").touch()
    assert [faults.point("bind") for _ in range(5)] == ["", "drop", "drop", "", ""]
    assert [file.name for file in armed.iterdir()] == ["bind:prefill:flip"]


def test_what_was_counted_of_a_fault_that_another_process_took_is_not_of_the_next_one(armed: Path) -> None:
    fault = armed / "bind:decode:drop"
    fault.write_text("after=5")
    assert [faults.point("bind") for _ in range(4)] == [""] * 4
    fault.unlink()  # by the other
    fault.write_text("after=1")
    os.utime(fault, ns=(1, 1))  # two writes within a tick of the file system's clock would look the same
    assert [faults.point("bind") for _ in range(3)] == ["", "drop", ""]
    assert not fault.exists()


def test_refuse_raises_and_delay_waits(armed: Path) -> None:
    (armed / "bind:decode-0:refuse").touch()
    with pytest.raises(Overloaded, match="injected at bind"):
        faults.point("bind")
    (armed / "step:decode-0:delay").write_text("seconds=0.05")
    began = time.monotonic()
    assert faults.point("step") == ""
    assert time.monotonic() - began >= 0.05


def test_kill_ends_the_process_at_once(tmp_path: Path) -> None:
    (tmp_path / "step:decode-0:kill").write_text("after=1")
    code = (
        f"from pagewire_core import faults; faults.arm('decode-0@{tmp_path}')\n"
        "for i in range(3): print(i, flush=True); faults.point('step')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert (ended.returncode, ended.stdout.split()) == (-9, [b"0", b"1"])
