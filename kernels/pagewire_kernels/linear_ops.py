"""Products, mostly with quantized weights: out [M, N] = x [M, K] times the transposed weight, plus bias [N].

Re-exported by ops.py. Sums are fp32 and in an order that depends on shapes alone, so a call gives the same bits every
time. `out` is preallocated, in any float dtype. A scale of a group, and the weight times it, may be rounded to x's
dtype before they are multiplied.
"""

from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.dispatch import implementation
from pagewire_kernels.step_checks import FP8, check_factors, check_gemm, check_groups, check_shape


def gemv(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """A single row, x [1, K], times weight [N, K] in the same dtype: decode with one sequence."""
    check_gemm(x, weight, weight.shape[-1], out, bias)
    check(
        x.shape[0] == 1 and x.dtype == weight.dtype, f"x must be {weight.dtype} [1, K], got {x.dtype} {tuple(x.shape)}"
    )
    implementation(x.device.type).gemv(x, weight, out, bias)


def gemm_gated(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [M, N] = silu(x gate^T) * (x up^T), weight [2 * N, K] in x's dtype being gate and then up.

    Each product is rounded to that dtype before the rest, as silu_and_mul would read it.
    """
    check_factors(x, weight, weight.shape[-1])
    check(weight.shape[0] % 2 == 0, f"the weight must have as many rows for up as for gate, got {weight.shape[0]}")
    check_shape("out", out, (x.shape[0], weight.shape[0] // 2))
    check(x.dtype == weight.dtype, f"x must be {weight.dtype}, got {x.dtype}")
    implementation(x.device.type).gemm_gated(x, weight, out)


def gemm_w8(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """weight int8 [N, K]; scales [N], one for each row, applied to the sum, or [N, K / group] (group 32, 64 or 128)."""
    num_inputs = weight.shape[-1]
    check_gemm(x, weight, num_inputs, out, bias)
    if scales.dim() == 1:
        check_shape("scales", scales, (weight.shape[0],))
    else:
        check_groups(scales, weight, num_inputs, num_inputs // scales.shape[1])
    implementation(x.device.type).gemm_w8(x, weight, scales, out, bias)


def gemm_w4(x: Tensor, packed: Tensor, scales: Tensor, group: int, out: Tensor, bias: Tensor | None = None) -> None:
    """packed uint8 [N, K / 2] as int4.pack_int4 makes it, scales [N, K / group], group 32, 64 or 128."""
    num_inputs = 2 * packed.shape[-1]
    check_gemm(x, packed, num_inputs, out, bias)
    check_groups(scales, packed, num_inputs, group)
    implementation(x.device.type).gemm_w4(x, packed, scales, group, out, bias)


def gemm_fp8(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    """x e4m3 [M, K] times x_scales float32 [M], weight e4m3 [N, K] times w_scales float32 [N]."""
    check_gemm(x, weight, weight.shape[-1], out, bias)
    check(x.dtype == weight.dtype == FP8, f"x and weight must be {FP8}, got {x.dtype} and {weight.dtype}")
    check_shape("x_scales", x_scales, (x.shape[0],))
    check_shape("w_scales", w_scales, (weight.shape[0],))
    implementation(x.device.type).gemm_fp8(x, x_scales, weight, w_scales, out, bias)
