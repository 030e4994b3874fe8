"""Every kernel compiled ahead of time for three GPU generations, without a GPU: it fits, and it does not spill.

Not collected by name: test_triton.py runs this file in a process of its own, without TRITON_INTERPRET, because an
interpreted kernel has no source to compile.
"""

import dataclasses
import importlib
import re
import sys

import pytest
import triton
import triton.language as tl
from pagewire_kernels import aot
from pagewire_kernels.compile_ahead import Entry, ResourceUsage, compile_kernel, compile_to, make_entry

# What one program may use of a processor's shared memory: 163 KiB on A100, 227 KiB on H100 and B200.
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ENTRIES = {entry.name: entry for entry in aot.entries()}
CASES = [(name, sm) for name, entry in ENTRIES.items() for sm in entry.sms]


@pytest.mark.parametrize(("name", "sm"), CASES)
def test_kernel_compiles_and_fits(name: str, sm: int) -> None:
    used = compile_kernel(ENTRIES[name], sm)
    assert problems(used) == []


def test_every_kernel_is_in_the_table() -> None:
    """Whatever the Triton implementation imports; functions that kernels call have no name ending in _kernel."""
    importlib.import_module("pagewire_kernels.triton_ops")
    modules = [module for name, module in sys.modules.items() if name.startswith("pagewire_kernels.")]
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {entry.kernel for entry in ENTRIES.values()}


@pytest.mark.parametrize("kind", ["int8 rows", "int4 groups of 32", "fp8 rows"])
@pytest.mark.parametrize("num_rows", [16, 128])
def test_products_run_on_the_tensor_cores_of_hopper(kind: str, num_rows: int) -> None:
    """A tile that falls back to mma.sync or to plain multiply-adds still gives the right numbers."""
    ptx = compile_to(ENTRIES[f"gemm {kind} {num_rows} rows"], 90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx


@pytest.mark.parametrize("kind", ["int8 rows", "int8 groups of 64", "int4 groups of 32", "int4 groups of 128"])
@pytest.mark.parametrize("num_rows", [16, 32, 64, 128])
def test_registers_are_not_overwritten_while_a_product_reads_weights_from_them(kind: str, num_rows: int) -> None:
    """Every wait is for all products: one that is left running still reads what the next tile overwrites."""
    ptx = compile_to(ENTRIES[f"gemm {kind} {num_rows} rows"], 90).asm["ptx"]
    waits = re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx)
    assert waits and set(waits) == {"0"}


def test_a_tile_too_large_is_a_problem() -> None:
    """The guard must be able to fail: with 256 keys a tile, gemma's prefill neither fits nor stays in registers."""
    entry = ENTRIES["paged_prefill gemma-2-9b bf16"]
    huge = dataclasses.replace(entry, constexprs=entry.constexprs | {"BLOCK_N": 256})
    assert len(problems(compile_kernel(huge, 80))) == 2


def test_a_kernel_that_is_wrong_does_not_compile() -> None:
    signature = {"x_ptr": "*fp32", "BLOCK": "constexpr"}
    entry = Entry("broken", broken_kernel, signature, {"BLOCK": 32}, {"num_warps": 4})
    with pytest.raises(triton.CompilationError):
        compile_kernel(entry, 90)


def test_a_parameter_nobody_typed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without a type or value: \['BLOCK'\]"):
        make_entry("broken", broken_kernel, {"x_ptr": "*fp32"}, {"num_warps": 4})


# Tiles are chosen by what is fastest on sm_90, where one (e4m3, with 40 bytes) is so although it spills. The others
# must compile; how far they spill depends on the version of triton.
MAX_SPILL_BYTES = {80: 80, 90: 40, 100: 64}


def problems(used: ResourceUsage) -> list[str]:
    found = []
    if used.spill_bytes > MAX_SPILL_BYTES[used.sm]:
        found.append(f"spills {used.spill_bytes} bytes a thread with {used.registers} registers")
    if used.shared_bytes > MAX_SHARED_BYTES[used.sm]:
        found.append(f"{used.shared_bytes} bytes of shared memory, {MAX_SHARED_BYTES[used.sm]} there are")
    return found


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    # Tiles of 32 and 16 elements do not add up.
    x = tl.load(x_ptr + tl.arange(0, BLOCK)) + tl.arange(0, 16)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)
