"""Which variant of the CPU step is built, for the CPU and the compiler at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pagewire_kernels.cpu import build as cpu_build
from pagewire_kernels.cpu.build import VARIANTS, runnable


def build(tmp_path: Path, *unknown: str, **environment: str) -> tuple[str, str]:
    """What the build says, and warns of, where a compiler does not know the flags `unknown`; it compiles nothing."""
    compiler = tmp_path / "c++"
    refused = "|".join(f"*{flag}" for flag in unknown) or "nothing"
    refuse = f"case $flag in {refused}) echo \"error: unknown '$flag'\" >&2; exit 1;; esac"
    compiler.write_text(f"#!/bin/sh\nfor flag; do\n  {refuse}\ndone\n")
    compiler.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-m", "pagewire_kernels.cpu.build"], capture_output=True, text=True, check=True,
        env=os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)} | environment,
    )  # fmt: skip
    return run.stdout, run.stderr


def test_the_best_variant_that_the_cpu_runs_is_built(tmp_path: Path) -> None:
    said, warned = build(tmp_path)
    assert said.startswith(f"CPU step, {runnable()[0]}: ") and not warned


@pytest.mark.parametrize("granted", [True, False])
def test_the_matrix_unit_is_used_where_the_kernel_grants_it(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox may show its flags and still refuse it: the first instruction would end the process."""
    every = frozenset().union(*(needed for _, needed in VARIANTS.values()))
    monkeypatch.setattr(cpu_build, "_cpu_features", lambda: every)
    monkeypatch.setattr(cpu_build, "_matrix_unit_is_granted", lambda: granted)
    assert ("amx" in runnable()) == granted
    assert runnable()[0] == ("amx" if granted else "avx512-bf16-vnni")


@pytest.mark.skipif(len(runnable()) < 2, reason="needs a CPU that runs more than the portable variant")
def test_a_compiler_older_than_the_cpu_makes_the_best_variant_that_it_knows(tmp_path: Path) -> None:
    best, *others = runnable()
    newest = VARIANTS[best][0][-1]
    expected = next(name for name in others if newest not in VARIANTS[name][0])
    said, warned = build(tmp_path, newest)
    assert said.startswith(f"CPU step, {expected}: ") and f"none for {best}" in warned and newest in warned


def test_a_compiler_that_makes_none_is_told_once(tmp_path: Path) -> None:
    said, _ = build(tmp_path, "-std=c++20")
    assert said.startswith("No compiled CPU step: the compiler failed: error: unknown '-std=c++20'")


def test_a_forced_variant_is_built_or_refused(tmp_path: Path) -> None:
    assert build(tmp_path, PAGEWIRE_CPU_VARIANT="portable")[0].startswith("CPU step, portable: ")
    assert "PAGEWIRE_CPU_VARIANT='z80' cannot run here" in build(tmp_path, PAGEWIRE_CPU_VARIANT="z80")[0]
