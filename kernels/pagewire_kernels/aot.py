"""Ahead-of-time compilation of every kernel, without a GPU: registers, spills and shared memory as a guard for CI.

`python -m pagewire_kernels.aot` prints the table. TRITON_INTERPRET must not be set: interpreted kernels have no source
to compile.
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

from pagewire_kernels import kv_copy, paged_decode, paged_prefill

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SMS = (80, 90, 100)
# Scalars the kernels do not specialise on, so no divisibility may be promised for them.
_PLAIN = ("scale_log2", "num_tokens", "num_seqs", "stride_tb")


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel as it is launched for one model shape."""

    name: str
    kernel: Any  # triton's JITFunction
    signature: dict[str, str]  # every parameter in order; "constexpr" for those in constexprs
    constexprs: dict[str, int | bool]
    options: dict[str, int]  # num_warps, num_stages


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """What one program of a compiled kernel takes."""

    name: str
    sm: int
    registers: int  # per thread
    spill_bytes: int  # stack and local memory per thread
    shared_bytes: int  # per program
    num_warps: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a well-known model family."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    demanding: bool = False  # large tiles


SHAPES = (
    Shape("llama-8b", 32, 8, 128, demanding=True),
    Shape("smollm2-135m", 9, 3, 64),
    Shape("phi-2", 32, 32, 80),
    Shape("gemma-2-9b", 16, 8, 256, window=4096, demanding=True),
    Shape("falcon-7b", 71, 1, 64, demanding=True),
)
BLOCK_SIZE = 16


def entries() -> list[Entry]:
    """Every kernel: all shapes in bf16, the demanding ones in fp32, and one in fp16, which compiles as bf16 does."""
    table = [entry for shape in SHAPES for entry in _attention_entries(shape, "bf16")]
    table += [entry for shape in SHAPES if shape.demanding for entry in _attention_entries(shape, "fp32")]
    table += _attention_entries(SHAPES[0], "fp16")
    return table + [entry for dtype in ("bf16", "fp32") for entry in _copy_entries(SHAPES[0], dtype)]


def compile_kernel(entry: Entry, sm: int) -> ResourceUsage:
    """Compile for compute capability `sm` (80, 90, 100), down to machine code.

    triton.CompilationError: the kernel is wrong. RuntimeError: ptxas or cuobjdump failed.
    """
    names = list(entry.signature)
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in entry.signature.items()
        if kind != "constexpr" and name not in _PLAIN
    }
    source = ASTSource(entry.kernel, entry.signature, constexprs=entry.constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=entry.options)
    registers, spill_bytes = _res_usage(compiled.asm["cubin"])
    return ResourceUsage(entry.name, sm, registers, spill_bytes, compiled.metadata.shared, compiled.metadata.num_warps)


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


def _entry(name: str, kernel: Any, kinds: dict[str, str], config: dict[str, int | bool]) -> Entry:
    """Split a launch configuration into constexprs and options; `kinds` types the other parameters."""
    options = {key: int(value) for key, value in config.items() if key in ("num_warps", "num_stages")}
    constexprs = {key: value for key, value in config.items() if key not in options}
    signature = {arg: kinds.get(arg, "constexpr") for arg in kernel.arg_names}
    undeclared = {arg for arg, kind in signature.items() if kind == "constexpr"} ^ set(constexprs)
    if undeclared:
        raise ValueError(f"{name}: parameters without a type or value: {sorted(undeclared)}")
    return Entry(name, kernel, signature, constexprs, options)


def _attention_entries(shape: Shape, dtype: str) -> list[Entry]:
    pointers = dict.fromkeys(("out_ptr", "q_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}")
    partials = dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32")
    indices = dict.fromkeys(("block_tables_ptr", "seq_lens_ptr", "cu_seqlens_q_ptr"), "*i32")
    strides = dict.fromkeys(("stride_qb", "stride_qt", "stride_kb", "stride_vb", "stride_tb", "num_seqs"), "i32")
    kinds = pointers | partials | indices | strides | {"scale_log2": "fp32"}
    group = shape.num_heads // shape.num_kv_heads
    block_d = max(16, triton.next_power_of_2(shape.head_dim))
    common: dict[str, int | bool] = {
        "H": shape.num_heads,
        "KVH": shape.num_kv_heads,
        "D": shape.head_dim,
        "BLOCK_SIZE": BLOCK_SIZE,
        "WINDOW": shape.window,
        "BLOCK_D": block_d,
        "UPCAST": False,
    }
    decode = common | paged_decode.launch(shape.head_dim, ITEMSIZE[dtype], group)
    prefill = common | paged_prefill.launch(shape.head_dim, ITEMSIZE[dtype], group)
    reduce = {"D": shape.head_dim, "SPLITS": 8, "BLOCK_D": block_d, "num_warps": 4}
    label = f"{shape.name} {dtype}"
    table = [
        _entry(f"paged_decode split {label}", paged_decode.decode_split_kernel, kinds, decode | {"SPLITS": 8}),
        _entry(f"paged_decode reduce {label}", paged_decode.decode_reduce_kernel, kinds, reduce),
        _entry(f"paged_prefill {label}", paged_prefill.prefill_kernel, kinds, prefill),
    ]
    if shape is SHAPES[0]:
        table.append(_entry(f"paged_decode {label}", paged_decode.decode_split_kernel, kinds, decode | {"SPLITS": 1}))
    return table


def _copy_entries(shape: Shape, dtype: str) -> list[Entry]:
    names = ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "wire_ptr", "kv_cache_ptr")
    strides = ("num_tokens", "stride_kt", "stride_vt", "stride_kb", "stride_vb", "stride_cl", "stride_ck", "stride_cb")
    kinds = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(strides, "i32") | {"slot_mapping_ptr": "*i64"}
    row = shape.num_kv_heads * shape.head_dim
    block_t, block_r = kv_copy.tile(row)
    config: dict[str, int | bool] = {"BLOCK_SIZE": BLOCK_SIZE, "ROW": row, "BLOCK_T": block_t, "BLOCK_R": block_r}
    return [
        _entry(f"write_kv {dtype}", kv_copy.write_kv_kernel, kinds, config),
        _entry(f"pack_kv {dtype}", kv_copy.copy_kv_kernel, kinds, config | {"TO_WIRE": True}),
        _entry(f"unpack_kv {dtype}", kv_copy.copy_kv_kernel, kinds, config | {"TO_WIRE": False}),
    ]


def main() -> None:
    """Print the resource table of every entry on every target."""
    print(f"{'kernel':44} {'sm':>4} {'registers':>9} {'spill B':>8} {'shared KiB':>10} {'warps':>6}")
    for entry in entries():
        for sm in SMS:
            used = compile_kernel(entry, sm)
            print(
                f"{used.name:44} {sm:4} {used.registers:9} {used.spill_bytes:8} "
                f"{used.shared_bytes / 1024:10.1f} {used.num_warps:6}"
            )


if __name__ == "__main__":
    main()
