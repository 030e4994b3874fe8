"""Residual add and RMS norm in one pass, with an e4m3 epilogue or without: one program holds one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.dependent_launch import dependent, wait_for_the_kernel_before
from pagewire_kernels.e4m3 import num_warps, store_e4m3_row


@triton.jit(do_not_specialize=["eps"])
def rms_norm_residual_kernel(
    out_ptr,  # [T, E]
    scales_ptr,  # fp32 [T], written if QUANTIZE
    x_ptr,  # [T, E], read if ADD
    residual_ptr,  # [T, E]
    weight_ptr,  # [E]
    eps,
    E: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    mask = e < E
    weight = tl.load(weight_ptr + e, mask=mask, other=0.0)
    hidden = tl.load(residual_ptr + row * E + e, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = hidden + tl.load(x_ptr + row * E + e, mask=mask, other=0.0).to(tl.float32)
        rounded = added.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * E + e, rounded, mask=mask)
        hidden = rounded.to(tl.float32)
    hidden = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / E + eps)
    y = hidden.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    if QUANTIZE:
        y = y.to(weight.dtype).to(tl.float32)
        store_e4m3_row(out_ptr + row * E + e, scales_ptr + row, y, mask, INTERPRETED)
    else:
        tl.store(out_ptr + row * E + e, y.to(weight.dtype).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm_residual(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """As ops.rms_norm_residual."""
    _launch(x, residual, weight, eps, out, None)


def rms_norm_residual_fp8(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor
) -> None:
    """As ops.rms_norm_residual_fp8."""
    _launch(x, residual, weight, eps, out, scales)


def _launch(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None) -> None:
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("out", out)):
        check(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")
    rows, width = residual.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    rms_norm_residual_kernel[(rows,)](
        out,
        out if scales is None else scales,
        residual if x is None else x,
        residual,
        weight,
        eps,
        E=width,
        ADD=x is not None,
        QUANTIZE=out.dtype == torch.float8_e4m3fn,
        BLOCK_E=block,
        INTERPRETED=not residual.is_cuda,
        num_warps=num_warps(block),
        **dependent(residual),
    )
