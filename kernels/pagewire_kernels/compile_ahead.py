"""Compiling a kernel down to machine code without a GPU, and what a program of it takes of one.

TRITON_INTERPRET must not be set: interpreted kernels have no source to compile.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SMS = (80, 90, 100)
# Scalars the kernels do not specialise on, so no divisibility may be promised for them.
_PLAIN = (
    "M",
    "eps",
    "k_scale",
    "num_chunks",
    "num_rows",
    "num_runs",
    "num_seqs",
    "num_tokens",
    "scale_log2",
    "stride_banned",
    "stride_bias",
    "stride_change",
    "stride_counts",
    "stride_plain",
    "stride_seat",
    "stride_tb",
    "v_scale",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel as it is launched for one model shape."""

    name: str
    kernel: Any  # triton's JITFunction
    signature: dict[str, str]  # every parameter in order; "constexpr" for those in constexprs
    constexprs: dict[str, int | bool]
    options: dict[str, int]  # num_warps, num_stages

    @property
    def sms(self) -> tuple[int, ...]:
        """Targets it can run on: sm_80 has neither e4m3 nor loads by descriptor."""
        young = any(kind == "*fp8e4nv" or kind.startswith("tensordesc") for kind in self.signature.values())
        return SMS[1:] if young else SMS


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """What one program of a compiled kernel takes."""

    name: str
    sm: int
    registers: int  # per thread
    spill_bytes: int  # stack and local memory per thread
    shared_bytes: int  # per program
    num_warps: int


def compile_kernel(entry: Entry, sm: int) -> ResourceUsage:
    """What one program takes on compute capability `sm` (80, 90, 100).

    triton.CompilationError: the kernel is wrong. RuntimeError: ptxas or cuobjdump failed.
    """
    compiled = compile_to(entry, sm)
    registers, spill_bytes = _res_usage(compiled.asm["cubin"])
    return ResourceUsage(entry.name, sm, registers, spill_bytes, compiled.metadata.shared, compiled.metadata.num_warps)


def compile_to(entry: Entry, sm: int) -> Any:
    """triton's CompiledKernel, down to machine code; errors as compile_kernel."""
    names = list(entry.signature)
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in entry.signature.items()
        if kind != "constexpr" and not kind.startswith("tensordesc") and name not in _PLAIN
    }
    pdl = bool(entry.constexprs.get("PDL")) and sm >= 90  # see dependent_launch.py
    constexprs = entry.constexprs | ({"PDL": pdl} if "PDL" in entry.constexprs else {})
    source = ASTSource(entry.kernel, entry.signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=entry.options | {"launch_pdl": pdl})


def _res_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack plus local bytes per thread, read by the cuobjdump that comes in triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", result.stdout)
    if result.returncode != 0 or found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {result.stdout}{result.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def make_entry(name: str, kernel: Any, kinds: dict[str, str], config: dict[str, int | bool]) -> Entry:
    """Split a launch configuration into constexprs and options; `kinds` types the other parameters."""
    options = {key: int(value) for key, value in config.items() if key in ("num_warps", "num_stages")}
    constexprs = {key: value for key, value in config.items() if key not in options}
    signature = {arg: kinds.get(arg, "constexpr") for arg in kernel.arg_names}
    undeclared = {arg for arg, kind in signature.items() if kind == "constexpr"} ^ set(constexprs)
    if undeclared:
        raise ValueError(f"{name}: parameters without a type or value: {sorted(undeclared)}")
    return Entry(name, kernel, signature, constexprs, options)
