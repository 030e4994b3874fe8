"""The CPU step for ARM: cross-compiled, run by an emulator, and compared with the portable build.

Skipped where there is no cross compiler or emulator (Debian: g++-aarch64-linux-gnu and qemu-user-static).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pagewire_kernels.cpu.build import VARIANTS

PROGRAM = Path(__file__).with_name("cpu_step_dump.cpp")
SOURCES = Path(__file__).parents[2] / "kernels/pagewire_kernels/cpu"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)
KINDS = ("float32", "bfloat16", "int8", "int8 in groups", "int4")


def build(compiler: str, flags: list[str], out: Path) -> Path:
    command = [compiler, "-std=c++20", "-O2", "-pthread", f"-I{SOURCES}", *flags, str(PROGRAM), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def run(command: list[str]) -> np.ndarray:
    """[kinds, steps, token and logits]"""
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return np.array([line.split() for line in text.splitlines()], float).reshape(len(KINDS), 2, -1)


@pytest.mark.skipif(not shutil.which(CROSS) or not EMULATOR, reason="no cross compiler or emulator for aarch64")
@pytest.mark.parametrize("variant", ["neon", "neon-bf16"])
def test_neon_computes_what_the_portable_build_computes(variant: str, tmp_path: Path) -> None:
    assert EMULATOR
    expected = run([str(build("g++", [], tmp_path / "portable"))])
    arm = build(CROSS, [*VARIANTS[variant][0], "-static"], tmp_path / "arm")
    got = run([EMULATOR, "-cpu", "max", str(arm)])
    for kind, ours, theirs in zip(KINDS, got, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3, kind


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_bfloat16_and_int8_stay_near_float32_on_the_portable_build(tmp_path: Path) -> None:
    """The kinds hold the same weights, rounded; a layout that is packed one way and read another would show here."""
    logits = run([str(build("g++", [], tmp_path / "portable"))])[:, :, 1:]
    for kind, other in zip(KINDS[1:], logits[1:], strict=True):
        relative = np.square(other - logits[0]).mean() / np.square(logits[0]).mean()
        assert relative < (0.1 if kind == "int4" else 0.002), kind
