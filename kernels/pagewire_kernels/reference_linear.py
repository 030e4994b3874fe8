"""Plain torch for products with quantized weights [N, K]: dequantise, then multiply in fp32."""

import torch
from torch import Tensor

from pagewire_kernels.int4 import unpack_int4
from pagewire_kernels.reference_step import silu_and_mul


def gemv(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemv."""
    _finish(x.float() @ weight.float().t(), bias, out)


def gemm_gated(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """As ops.gemm_gated."""
    silu_and_mul((x.float() @ weight.float().t()).to(x.dtype), out)


def gemm_w8(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemm_w8."""
    if scales.dim() == 1:
        product = x.float() @ weight.float().t() * scales.float()
    else:
        product = x.float() @ _dequantize(weight, scales, x.dtype).t()
    _finish(product, bias, out)


def gemm_w4(x: Tensor, packed: Tensor, scales: Tensor, group: int, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemm_w4."""
    _finish(x.float() @ _dequantize(unpack_int4(packed), scales, x.dtype).t(), bias, out)


def gemm_fp8(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    """As ops.gemm_fp8."""
    product = x.float() @ weight.float().t()
    _finish(product * x_scales.float()[:, None] * w_scales.float(), bias, out)


def _dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers times the scale of their group, both in `dtype`, as the kernels multiply them; fp32 [N, K]."""
    grouped = weight.to(dtype).unflatten(1, (scales.shape[1], -1))
    return (grouped * scales.to(dtype)[:, :, None]).flatten(1).float()


def _finish(product: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(product if bias is None else product + bias.float())
