"""What runs between matrix products, and the choice of tokens, as problems to check and time (gpu_kernels.py)."""

from __future__ import annotations

import torch
from pagewire_kernels import ops, reference_sampling, reference_step
from torch import Tensor

from pagewire_bench.kernel_cases import BLOCK_SIZE, FP8, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Case, nbytes

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
EPS = 1e-5


class Quantized:
    """Rows of e4m3 with a scale each."""

    def __init__(self, rows: int, width: int, device: str) -> None:
        self.values = torch.empty(rows, width, dtype=FP8, device=device)
        self.scales = torch.empty(rows, device=device)


def step_cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    """A prefill chunk of 8192 rows, and 128 rows of decode."""
    rows = 8192 // scale
    hidden, wide = HIDDEN // scale, INTERMEDIATE // scale
    return [
        _norm("rms_norm_residual", rows, hidden, dtype, device),
        _norm("rms_norm_residual 128 rows", 128, hidden, dtype, device),
        _norm_fp8(rows, hidden, dtype, device),
        _silu(rows, wide, dtype, device),
        _silu_fp8(rows, wide, dtype, device),
        _quantize(rows, hidden, dtype, device),
        _rope("rope_write_kv", rows, dtype, dtype, device),
        _rope("rope_write_kv 128 rows", 128, dtype, dtype, device),
        _rope("rope_write_kv e4m3", rows, dtype, FP8, device),
    ]


def sampling_cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    vocabulary, rows = VOCABULARY // scale, 128 // min(scale, 16)
    return [
        _sample(f"sample {rows} greedy", rows, vocabulary, (0.0, 0, 1.0), dtype, device),
        _sample(f"sample {rows} plain", rows, vocabulary, (1.0, 0, 1.0), dtype, device),
        _sample(f"sample {rows} top_k 50 top_p 0.9", rows, vocabulary, (0.8, 50, 0.9), dtype, device),
        _sample("sample 1 top_p 0.9", 1, vocabulary, (0.8, 0, 0.9), dtype, device),
        _sample("sample 1 top_p 0.9, flat", 1, vocabulary, (5.0, 0, 0.9), dtype, device),
    ]


def _norm(name: str, rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """Each side adds to a residual of its own; the first calls are compared."""
    x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.rand(width, device=device, dtype=dtype)
    residuals = [x.flip(0), x.flip(0)]
    out, expected = torch.empty_like(x), torch.empty_like(x)

    def run() -> Tensor:
        ops.rms_norm_residual(x, residuals[0], weight, EPS, out)
        return out

    def expect() -> Tensor:
        reference_step.rms_norm_residual(x, residuals[1], weight, EPS, expected)
        return expected

    return Case(name, run, expect, 4 * nbytes(x))


def _norm_fp8(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.rand(width, device=device, dtype=dtype)
    residuals = [x.flip(0), x.flip(0)]
    quantized = [Quantized(rows, width, device) for _ in range(2)]

    def run() -> Tensor:
        ops.rms_norm_residual_fp8(x, residuals[0], weight, EPS, quantized[0].values, quantized[0].scales)
        return quantized[0].scales

    def expect() -> Tensor:
        reference_step.rms_norm_residual_fp8(x, residuals[1], weight, EPS, quantized[1].values, quantized[1].scales)
        return quantized[1].scales

    return Case("rms_norm_residual_fp8", run, expect, 3 * nbytes(x) + nbytes(quantized[0].values))


def _silu(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    gate_up = torch.randn(rows, 2 * width, device=device, dtype=dtype)
    out, expected = (torch.empty(rows, width, device=device, dtype=dtype) for _ in range(2))

    def expect() -> Tensor:
        reference_step.silu_and_mul(gate_up, expected)
        return expected

    return Case("silu_and_mul", lambda: ops.silu_and_mul(gate_up, out), expect, nbytes(gate_up, out))


def _silu_fp8(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    gate_up = torch.randn(rows, 2 * width, device=device, dtype=dtype)
    quantized = [Quantized(rows, width, device) for _ in range(2)]

    def run() -> Tensor:
        ops.silu_and_mul_fp8(gate_up, quantized[0].values, quantized[0].scales)
        return quantized[0].scales

    def expect() -> Tensor:
        reference_step.silu_and_mul_fp8(gate_up, quantized[1].values, quantized[1].scales)
        return quantized[1].scales

    return Case("silu_and_mul_fp8", run, expect, nbytes(gate_up, quantized[0].values))


def _quantize(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    quantized = [Quantized(rows, width, device) for _ in range(2)]

    def run() -> Tensor:
        ops.quantize_fp8_rows(x, quantized[0].values, quantized[0].scales)
        return quantized[0].values

    def expect() -> Tensor:
        reference_step.quantize_fp8_rows(x, quantized[1].values, quantized[1].scales)
        return quantized[1].values

    return Case("quantize_fp8_rows", run, expect, nbytes(x, quantized[0].values), exact=True)


def _rope(name: str, rows: int, dtype: torch.dtype, cache: torch.dtype, device: str) -> Case:
    qkv = torch.randn(rows, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, device=device, dtype=dtype)
    angles = torch.rand(rows, HEAD_DIM // 2, device=device) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.arange(rows, device=device)
    num_blocks = -(-2 * rows // BLOCK_SIZE)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:rows]
    outs = [torch.empty(rows, NUM_HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2)]
    caches = [
        torch.zeros(2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, device=device, dtype=cache) for _ in range(2)
    ]

    def run() -> Tensor:
        ops.rope_write_kv(qkv, positions, cos_sin, None, None, EPS, outs[0], caches[0][0], caches[0][1], slots)
        return outs[0]

    def expect() -> Tensor:
        reference_step.rope_write_kv(
            qkv, positions, cos_sin, None, None, EPS, outs[1], caches[1][0], caches[1][1], slots, 1.0, 1.0
        )
        return outs[1]

    written = 2 * rows * NUM_KV_HEADS * HEAD_DIM * cache.itemsize
    return Case(name, run, expect, nbytes(qkv, outs[0]) + nbytes(cos_sin) + written)


def _sample(
    name: str, rows: int, vocabulary: int, settings: tuple[float, int, float], dtype: torch.dtype, device: str
) -> Case:
    logits = (3 * torch.randn(rows, vocabulary, device=device)).to(dtype)
    params = ops.SamplingTensors.neutral(rows, vocabulary, device)
    params.temperature[:], params.top_k[:], params.top_p[:] = settings
    seats = torch.arange(rows, device=device, dtype=torch.int32)
    uniforms = torch.rand(rows, device=device, dtype=torch.float64)
    num_chosen = torch.zeros_like(seats)
    out, expected = torch.zeros_like(seats), torch.zeros_like(seats)

    def run() -> Tensor:
        ops.sample(logits, params, seats, uniforms, num_chosen, out)
        return out

    def expect() -> Tensor:
        reference_sampling.sample(logits, params, seats, uniforms, num_chosen, expected)
        return expected

    return Case(name, run, expect, nbytes(logits), tokens=True)
