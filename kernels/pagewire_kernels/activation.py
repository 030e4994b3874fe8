"""SiLU of the gate times the up projection, and rows quantized to e4m3 with a scale each."""

import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.dependent_launch import dependent, wait_for_the_kernel_before
from pagewire_kernels.e4m3 import num_warps, store_e4m3_row

_BLOCK = 1024  # 4 warps load 16 bytes a thread


@triton.jit
def gated(gate, up):
    """fp32, through the roundings of the model's dtype."""
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (activated * up.to(tl.float32)).to(gate.dtype).to(tl.float32)


@triton.jit
def silu_and_mul_kernel(
    out_ptr,  # [T, I]
    gate_up_ptr,  # [T, 2 * I]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + i, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * WIDTH + WIDTH + i, mask=mask, other=0.0)
    tl.store(out_ptr + row * WIDTH + i, gated(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows_kernel(
    out_ptr,  # e4m3 [T, K]
    scales_ptr,  # fp32 [T]
    x_ptr,  # [T, K], or [T, 2 * K] if SILU
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    if SILU:
        gate = tl.load(x_ptr + row * 2 * K + k, mask=mask, other=0.0)
        y = gated(gate, tl.load(x_ptr + row * 2 * K + K + k, mask=mask, other=0.0))
    else:
        y = tl.load(x_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
    store_e4m3_row(out_ptr + row * K + k, scales_ptr + row, y, mask, INTERPRETED)


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """As ops.silu_and_mul."""
    check(gate_up.is_contiguous() and out.is_contiguous(), "gate_up and out must be contiguous")
    rows, width = out.shape
    if rows:
        silu_and_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](
            out, gate_up, WIDTH=width, BLOCK=_BLOCK, num_warps=4, **dependent(out)
        )


def silu_and_mul_fp8(gate_up: Tensor, out: Tensor, scales: Tensor) -> None:
    """As ops.silu_and_mul_fp8."""
    _quantize(gate_up, out, scales, silu=True)


def quantize_fp8_rows(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """As ops.quantize_fp8_rows."""
    _quantize(x, out, scales, silu=False)


def _quantize(x: Tensor, out: Tensor, scales: Tensor, *, silu: bool) -> None:
    check(x.is_contiguous() and out.is_contiguous(), "x and out must be contiguous")
    rows, width = out.shape
    block = triton.next_power_of_2(width)
    if rows:
        quantize_rows_kernel[(rows,)](
            out,
            scales,
            x,
            K=width,
            SILU=silu,
            BLOCK=block,
            INTERPRETED=not x.is_cuda,
            num_warps=num_warps(block),
            **dependent(x),
        )
