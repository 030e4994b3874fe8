"""Products with quantized weights as problems to check and time (gpu_kernels.py), on Llama 3 8B's matrices."""

from __future__ import annotations

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
    out, expected = _outputs(x, shape[0])

    def run() -> Tensor:
        ops.gemv(x, weight, out)
        return out

    def expect() -> Tensor:
        reference_linear.gemv(x, weight, expected)
        return expected

    return Case(f"gemv {label}", run, expect, nbytes(weight, x, out), peer=lambda: x @ weight.t())


def _gated(label: str, rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    weight = (torch.randn(shape, device=device) * shape[1] ** -0.5).to(dtype)
    out, expected = _outputs(x, shape[0] // 2)

    def run() -> Tensor:
        ops.gemm_gated(x, weight, out)
        return out

    def expect() -> Tensor:
        reference_linear.gemm_gated(x, weight, expected)
        return expected

    def peer() -> None:
        ops.silu_and_mul(x @ weight.t(), out)

    return Case(f"gemm_gated {label}", run, expect, nbytes(weight, x, out), _flops(x, shape[0]), peer=peer)


def _w8(label: str, x: Tensor, outputs: int) -> Case:
    weight = torch.randint(-127, 128, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
    scales = torch.full((outputs,), 1 / (74 * x.shape[1] ** 0.5), device=x.device)
    out, expected = _outputs(x, outputs)

    def run() -> Tensor:
        ops.gemm_w8(x, weight, scales, out)
        return out

    def expect() -> Tensor:
        reference_linear.gemm_w8(x, weight, scales, expected)
        return expected

    dense = weight.to(x.dtype)
    return Case(f"gemm_w8 {label}", run, expect, nbytes(weight, x, out), _flops(x, outputs), peer=lambda: x @ dense.t())


def _w4(label: str, x: Tensor, outputs: int) -> Case:
    q = torch.randint(-8, 8, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
    packed = ops.pack_int4(q)
    scales = torch.full((outputs, x.shape[1] // 32), 1 / (4.6 * x.shape[1] ** 0.5), device=x.device).half()
    out, expected = _outputs(x, outputs)

    def run() -> Tensor:
        ops.gemm_w4(x, packed, scales, 32, out)
        return out

    def expect() -> Tensor:
        reference_linear.gemm_w4(x, packed, scales, 32, expected)
        return expected

    return Case(f"gemm_w4 {label}", run, expect, nbytes(packed, scales, x, out), _flops(x, outputs))


def _fp8(label: str, x: Tensor, outputs: int) -> Case:
    """e4m3 runs at twice the rate of bf16, in which the arithmetic of the floor is counted."""
    values, x_scales = torch.empty_like(x, dtype=FP8), torch.empty(len(x), device=x.device)
    ops.quantize_fp8_rows(x, values, x_scales)
    weight = torch.randn(outputs, x.shape[1], device=x.device).to(FP8)
    w_scales = torch.full((outputs,), x.shape[1] ** -0.5, device=x.device)
    out, expected = _outputs(x, outputs)

    def run() -> Tensor:
        ops.gemm_fp8(values, x_scales, weight, w_scales, out)
        return out

    def expect() -> Tensor:
        reference_linear.gemm_fp8(values, x_scales, weight, w_scales, expected)
        return expected

    def peer() -> Tensor:
        return torch._scaled_mm(
            values, weight.t(), x_scales[:, None], w_scales[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Case(f"gemm_fp8 {label}", run, expect, nbytes(weight, values, out), _flops(x, outputs) // 2, peer=peer)


def _outputs(x: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), outputs), x.new_empty(len(x), outputs)


def _flops(x: Tensor, outputs: int) -> int:
    return 2 * x.numel() * outputs
