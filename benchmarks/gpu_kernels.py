"""The Triton kernels on a CUDA device: right against the torch reference, then timed against what the device can do.

    python benchmarks/gpu_kernels.py [--out results.json] [--dtype bf16|fp16] [--quick]

The limits are measured in the same run: a device-to-device copy for bytes, a large matrix product for arithmetic. The
floor of a kernel is the time the larger of its two needs would take at these rates; the ratio is floor / measured, so 1
is perfect. Every timed call finds the L2 cache flushed. Exits with 1 if any kernel disagrees with the reference.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from pagewire_kernels import ops, reference
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of |difference| / (1 + |value|)
BLOCK_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama 3 8B
SCALE = HEAD_DIM**-0.5
FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Case:
    """One kernel on one problem."""

    name: str
    run: Callable[[], Tensor]
    expect: Callable[[], Tensor]
    num_bytes: int  # read and written at least once
    num_flops: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    max_error: float
    ok: bool
    ms: float
    floor_ms: float
    ratio: float


class Pages:
    """One layer of random cache and shuffled block tables for sequences of the given lengths."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, device: str) -> None:
        pages = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(pages)).int()
        self.block_tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for s, blocks in enumerate(order.split(pages)):
            self.block_tables[s, : pages[s]] = blocks
        self.block_tables = self.block_tables.to(device)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        shape = (sum(pages), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.k_cache = torch.randn(shape, device=device).to(dtype)
        self.v_cache = torch.randn(shape, device=device).to(dtype)
        self.num_kv_bytes = 2 * sum(lengths) * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize


def decode_case(name: str, lengths: list[int], window: int, dtype: torch.dtype, device: str) -> Case:
    pages = Pages(lengths, dtype, device)
    q = torch.randn(len(lengths), NUM_HEADS, HEAD_DIM, device=device).to(dtype)
    args = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens, SCALE, window)
    seen = sum(min(length, window) if window else length for length in lengths)
    num_bytes = pages.num_kv_bytes * seen // sum(lengths) + 2 * nbytes(q)
    return Case(name, lambda: ops.paged_decode(*args), lambda: reference.paged_decode(*args), num_bytes)


def prefill_case(name: str, lengths: list[int], chunks: list[int], dtype: torch.dtype, device: str) -> Case:
    pages = Pages(lengths, dtype, device)
    q = torch.randn(sum(chunks), NUM_HEADS, HEAD_DIM, device=device).to(dtype)
    cu_seqlens_q = torch.tensor([0, *chunks], device=device).cumsum(0).int()
    args = (q, pages.k_cache, pages.v_cache, pages.block_tables, cu_seqlens_q, pages.seq_lens, SCALE)
    # Row r of a chunk sees length - chunk + r + 1 keys; 2 flops each for the scores and for the values.
    seen = sum(
        chunk * (length - chunk) + chunk * (chunk + 1) // 2 for length, chunk in zip(lengths, chunks, strict=True)
    )
    num_flops = 4 * seen * NUM_HEADS * HEAD_DIM
    num_bytes = pages.num_kv_bytes + 2 * nbytes(q)
    return Case(name, lambda: ops.paged_prefill(*args), lambda: reference.paged_prefill(*args), num_bytes, num_flops)


def copy_cases(num_layers: int, num_tokens: int, dtype: torch.dtype, device: str) -> list[Case]:
    num_blocks = 2 * num_tokens // BLOCK_SIZE
    shape = (num_layers, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = torch.randn(shape, device=device, dtype=dtype)
    scratch = [torch.zeros_like(cache) for _ in range(2)]
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:num_tokens]
    layers = (0, num_layers)
    wire = reference.pack_kv(cache, slots, layers)
    k, v = wire[0, 0], wire[0, 1]

    def unpack(implementation: Callable[..., None], into: Tensor) -> Tensor:
        implementation(wire, into, slots, layers)
        return into

    def write(implementation: Callable[..., None], into: Tensor) -> Tensor:
        implementation(k, v, into[0, 0], into[0, 1], slots)
        return into[0]

    return [
        Case(
            f"write_kv {num_tokens} tokens",
            lambda: write(ops.write_kv, scratch[0]),
            lambda: write(reference.write_kv, scratch[1]),
            2 * (nbytes(k) + nbytes(v)),
            exact=True,
        ),
        Case(
            f"pack_kv {num_layers} layers {num_tokens} tokens",
            lambda: ops.pack_kv(cache, slots, layers),
            lambda: wire,
            2 * nbytes(wire),
            exact=True,
        ),
        Case(
            f"unpack_kv {num_layers} layers {num_tokens} tokens",
            lambda: unpack(ops.unpack_kv, scratch[0]),
            lambda: unpack(reference.unpack_kv, scratch[1]),
            2 * nbytes(wire),
            exact=True,
        ),
    ]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    """`scale` divides the sizes: 1 for the real ones."""
    spread = [(200 + 61 * i) // scale for i in range(64)]
    return [
        decode_case("decode 1 x 32k", [32768 // scale], 0, dtype, device),
        decode_case("decode 8 x 4k", [4096 // scale] * 8, 0, dtype, device),
        decode_case("decode 64 x 2k", [2048 // scale] * 64, 0, dtype, device),
        decode_case("decode 64 uneven 0.2k-4k", spread, 0, dtype, device),
        decode_case("decode 16 x 8k window 1k", [8192 // scale] * 16, 1024 // scale, dtype, device),
        prefill_case("prefill 1 x 4k", [4096 // scale], [4096 // scale], dtype, device),
        prefill_case("prefill chunk 1k of 16k", [16384 // scale], [1024 // scale], dtype, device),
        prefill_case(
            "prefill 1k of 2k + 32 decode rows", [2048 // scale] * 33, [1024 // scale] + [1] * 32, dtype, device
        ),
        *copy_cases(32 // min(scale, 16), 4096 // scale, dtype, device),
    ]


def check(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    out, expected = case.run(), case.expect()
    if case.exact:
        return (out.float() - expected.float()).abs().max().item(), torch.equal(out, expected)
    error = ((out.float() - expected.float()).abs() / (1 + expected.float().abs())).max().item()
    return error, error <= TOLERANCE[dtype]  # NaN is not <=


def measure_ms(run: Callable[[], object], repeats: int) -> float:
    """Median device time. Flushing L2 also gives the host time to queue the call before the device is free for it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def copy_bytes_per_s(repeats: int) -> float:
    source = torch.ones(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes(source) / (measure_ms(lambda: target.copy_(source), repeats) / 1e3)


def matmul_flops_per_s(dtype: torch.dtype, repeats: int) -> float:
    size = 8192
    a, b = torch.randn(size, size, device="cuda").to(dtype), torch.randn(size, size, device="cuda").to(dtype)
    return 2 * size**3 / (measure_ms(lambda: a @ b, repeats) / 1e3)


def report(name: str, case: Case, dtype: torch.dtype, bandwidth: float, peak: float, repeats: int) -> Row:
    error, ok = check(case, dtype)
    ms = measure_ms(case.run, repeats)
    floor_ms = 1e3 * max(case.num_bytes / bandwidth, case.num_flops / peak)
    return Row(name, error, ok, ms, floor_ms, floor_ms / ms)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the Triton kernels on a CUDA device.")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quick", action="store_true", help="problems an eighth of the size, few repeats")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels needs a CUDA device, and torch finds none on this machine.")
    if ops.implementation("cuda").name != "triton":
        sys.exit("gpu_kernels measures the Triton kernels: install triton and leave PAGEWIRE_KERNELS unset.")
    torch.manual_seed(0)
    dtype, repeats = DTYPES[options.dtype], 5 if options.quick else 30
    bandwidth, peak = copy_bytes_per_s(repeats), matmul_flops_per_s(dtype, repeats)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {options.dtype}")
    print(f"copy {bandwidth / 1e9:.0f} GB/s (read + write), matmul {peak / 1e12:.0f} TFLOP/s\n")
    print(f"{'kernel':36} {'max error':>10} {'':>5} {'ms':>8} {'floor ms':>9} {'ratio':>6}")
    rows = []
    for case in cases(dtype, "cuda", 8 if options.quick else 1):
        row = report(case.name, case, dtype, bandwidth, peak, repeats)
        rows.append(row)
        verdict = "ok" if row.ok else "WRONG"
        print(f"{row.name:36} {row.max_error:10.2g} {verdict:>5} {row.ms:8.3f} {row.floor_ms:9.3f} {row.ratio:6.2f}")
    if options.out:
        result = {
            "device": device,
            "torch": torch.__version__,
            "dtype": options.dtype,
            "copy_bytes_per_s": bandwidth,
            "matmul_flops_per_s": peak,
            "rows": [asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if not all(row.ok for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
