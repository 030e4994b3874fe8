"""Products with quantized weights as problems to check and time (gpu_kernels.py), on Llama 3 8B's matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pagewire_kernels import ops, reference_linear
from torch import Tensor

from pagewire_bench.kernel_cases import FP8, Case, nbytes

# Outputs and inputs of gate and up together, of down, and of the attention's output.
MATRICES = {"gate_up": (28672, 4096), "down": (4096, 14336), "o": (4096, 4096)}
ROWS = {"gate_up": (1, 16, 64, 128, 4096), "down": (1, 16), "o": (1, 16)}


def linear_cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    """Every form of weight. The floor of few rows is reading the weight, of many the arithmetic."""
    table = []
    for name, (outputs, inputs) in MATRICES.items():
        shape = max(outputs // scale, 32), max(inputs // scale // 128, 1) * 128
        if name == "gate_up":
            table += [_gated(f"{name} {rows} rows", rows, shape, dtype, device) for rows in (8, 64, 128)]
        for rows in ROWS[name]:
            if rows == 1:
                table.append(_gemv(f"{name} 1 row", shape, dtype, device))
            x = torch.randn(min(rows, 4096 // scale), shape[1], device=device).to(dtype)
            label = f"{name} {len(x)} rows"
            table += [_w8(label, x, shape[0]), _w4(label, x, shape[0]), _fp8(label, x, shape[0])]
    return table


def _gemv(label: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(1, shape[1], device=device).to(dtype)
    weight = (torch.randn(shape, device=device) * shape[1] ** -0.5).to(dtype)
    return _case("gemv", label, (x, weight), shape[0], nbytes(weight, x), 0, lambda: x @ weight.t())


def _gated(label: str, rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    weight = (torch.randn(shape, device=device) * shape[1] ** -0.5).to(dtype)
    activated = x.new_empty(rows, shape[0] // 2)
    return _case(
        "gemm_gated", label, (x, weight), shape[0] // 2, nbytes(weight, x), _flops(x, shape[0]),
        lambda: ops.silu_and_mul(x @ weight.t(), activated),
    )  # fmt: skip


def _w8(label: str, x: Tensor, outputs: int) -> Case:
    weight = torch.randint(-127, 128, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
    scales = torch.full((outputs,), 1 / (74 * x.shape[1] ** 0.5), device=x.device)
    dense = weight.to(x.dtype)
    arguments = x, weight, scales
    return _case("gemm_w8", label, arguments, outputs, nbytes(weight, x), _flops(x, outputs), lambda: x @ dense.t())


def _w4(label: str, x: Tensor, outputs: int) -> Case:
    q = torch.randint(-8, 8, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
    packed = ops.pack_int4(q)
    scales = torch.full((outputs, x.shape[1] // 32), 1 / (4.6 * x.shape[1] ** 0.5), device=x.device).half()
    arguments = x, packed, scales, 32
    return _case("gemm_w4", label, arguments, outputs, nbytes(packed, scales, x), _flops(x, outputs))


def _fp8(label: str, x: Tensor, outputs: int) -> Case:
    """e4m3 runs at twice the rate of bf16, in which the arithmetic of the floor is counted."""
    values, x_scales = torch.empty_like(x, dtype=FP8), torch.empty(len(x), device=x.device)
    ops.quantize_fp8_rows(x, values, x_scales)
    weight = torch.randn(outputs, x.shape[1], device=x.device).to(FP8)
    w_scales = torch.full((outputs,), x.shape[1] ** -0.5, device=x.device)

    def peer() -> Tensor:
        return torch._scaled_mm(
            values, weight.t(), x_scales[:, None], w_scales[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    arguments = values, x_scales, weight, w_scales
    return _case("gemm_fp8", label, arguments, outputs, nbytes(weight, values), _flops(x, outputs) // 2, peer, x.dtype)


def _case(
    op: str,
    label: str,
    arguments: tuple[Any, ...],
    outputs: int,
    bytes_read: int,
    num_flops: int,
    peer: Callable[[], object] | None = None,
    dtype: torch.dtype | None = None,
) -> Case:
    """`op` of ops.py and of reference_linear.py on the same arguments, x first; dtype: of the output, if not x's."""
    x = arguments[0]
    out, expected = (x.new_empty(len(x), outputs, dtype=dtype or x.dtype) for _ in range(2))

    def run() -> Tensor:
        getattr(ops, op)(*arguments, out)
        return out

    def expect() -> Tensor:
        getattr(reference_linear, op)(*arguments, expected)
        return expected

    return Case(f"{op} {label}", run, expect, bytes_read + nbytes(out), num_flops, peer=peer)


def _flops(x: Tensor, outputs: int) -> int:
    return 2 * x.numel() * outputs
