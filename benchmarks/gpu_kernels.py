"""The Triton kernels on a CUDA device: right against the torch reference, then timed against what the device can do.

    python benchmarks/gpu_kernels.py [--out results.json] [--dtype bf16|fp16] [--quick]

The limits are measured in the same run: a device-to-device copy for bytes, a large matrix product for arithmetic. The
floor of a kernel is the time the larger of its two needs would take at these rates; the ratio is floor / measured, so 1
is perfect. copy: what torch's copy of as many bytes takes, timed as the kernel is: a small problem has the start of a
kernel and the latency of memory in it, whoever computes. peer: what torch takes for the same problem, where it has an
operation for it. Every timed call finds other, clean lines in the L2 cache and is part of a CUDA graph. Exits with 1 if
any kernel disagrees with the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from pagewire_bench.kernel_cases import Case, attention_cases, nbytes
from pagewire_bench.kernel_linear_cases import linear_cases
from pagewire_bench.kernel_step_cases import sampling_cases, step_cases
from pagewire_kernels import ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of |difference| / (1 + |value|)
MAX_OTHER_TOKENS = 0.02  # part of the rows: sums in another order choose another token at a boundary
FLUSH_BYTES = 512 << 20
WARM_COPIES = 2000


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    max_error: float
    ok: bool
    ms: float
    floor_ms: float
    ratio: float
    copy_ms: float | None  # where bytes are the floor
    peer_ms: float | None


def cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    """`scale` divides the sizes: 1 for the real ones."""
    return [
        *attention_cases(dtype, device, scale),
        *step_cases(dtype, device, scale),
        *linear_cases(dtype, device, scale),
        *sampling_cases(dtype, device, scale),
    ]


def check(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    out, expected = case.run(), case.expect()
    if case.tokens:
        others = (out != expected).float().mean().item()
        return others, others <= MAX_OTHER_TOKENS
    if case.exact:
        return (out.float() - expected.float()).abs().max().item(), torch.equal(out, expected)
    error = ((out.float() - expected.float()).abs() / (1 + expected.float().abs())).max().item()
    return error, error <= TOLERANCE[dtype]  # NaN is not <=


def measure_ms(run: Callable[[], object], repeats: int) -> float:
    """Median device time between two events of a graph, as in a decode step: the host has no part in it."""
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flush.sum()  # reads: what a write leaves in L2 must go to memory while the kernel runs
        start.record()
        run()
        end.record()
    times = []
    for _ in range(repeats):
        graph.replay()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def copy_ms(num_bytes: int, repeats: int) -> float:
    """Read and written together; by a kernel, since in a graph torch leaves a plain copy to the copy engine."""
    source = torch.ones(max(num_bytes // 4, 1), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return measure_ms(lambda: torch.neg(source, out=target), repeats)


def copy_bytes_per_s(repeats: int) -> float:
    """Of a device at work: after a second of it, as decode steps follow each other."""
    source = torch.ones(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + WARM_COPIES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * nbytes(source) / (median(times[WARM_COPIES:]) / 1e3)


def matmul_flops_per_s(dtype: torch.dtype, repeats: int) -> float:
    size = 8192
    a, b = torch.randn(size, size, device="cuda").to(dtype), torch.randn(size, size, device="cuda").to(dtype)
    return 2 * size**3 / (measure_ms(lambda: a @ b, repeats) / 1e3)


def report(name: str, case: Case, dtype: torch.dtype, bandwidth: float, peak: float, repeats: int) -> Row:
    error, ok = check(case, dtype)
    ms = measure_ms(case.run, repeats)
    floor_ms = 1e3 * max(case.num_bytes / bandwidth, case.num_flops / peak)
    bound_by_bytes = case.num_bytes / bandwidth > case.num_flops / peak
    like = copy_ms(case.num_bytes, repeats) if bound_by_bytes else None
    peer_ms = measure_ms(case.peer, repeats) if case.peer else None
    return Row(name, error, ok, ms, floor_ms, floor_ms / ms, like, peer_ms)


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
    print(
        f"{'kernel':36} {'max error':>10} {'':>5} {'ms':>8} {'floor ms':>9} {'ratio':>6} {'copy ms':>8} {'peer ms':>8}"
    )
    rows = []
    for case in cases(dtype, "cuda", 8 if options.quick else 1):
        row = report(case.name, case, dtype, bandwidth, peak, repeats)
        rows.append(row)
        verdict = "ok" if row.ok else "WRONG"
        like, peer = ("" if ms is None else f"{ms:8.3f}" for ms in (row.copy_ms, row.peer_ms))
        print(
            f"{row.name:36} {row.max_error:10.2g} {verdict:>5} {row.ms:8.3f} {row.floor_ms:9.3f} "
            f"{row.ratio:6.2f} {like:>8} {peer:>8}"
        )
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
