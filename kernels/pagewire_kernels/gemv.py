"""One row times a weight [N, K]: decode with a single sequence, bound by reading the weight once.

A program owns BLOCK_N rows of the weight and all of K, so no sum is split between programs. Products are kept apart
until the end, fp32 [BLOCK_N, BLOCK_C], and reduced once.
"""

import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.dependent_launch import dependent, wait_for_the_kernel_before
from pagewire_kernels.weight_tiles import DENSE, FP8_ROWS, INT4_GROUPS, INT8_GROUPS, INT8_ROWS, group_scales


@triton.jit
def _products_of_int4(x_ptr, words, columns, inside):
    """Sum over the eight inputs of a word: (q - 8) * x, fp32; words int32 [BLOCK_N, BLOCK_C], columns [BLOCK_C].

    128 + q is read from the mantissa, and 136 times the inputs' sum, the same for all rows, is taken away at the end.
    """
    first = (columns // 4) * 32 + (columns % 4) * 4  # of the run of 16 bytes, then of its word (see int4.py)
    sums = tl.zeros(words.shape, tl.float32)
    x_sums = tl.zeros(columns.shape, tl.float32)
    for nibble in tl.static_range(8):
        k = first + nibble // 2 + (nibble % 2) * 16
        x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
        if nibble < 4:
            bits = words << (16 - 4 * nibble)
        else:
            bits = words >> (4 * nibble - 16)
        value = (bits & 0xF0000 | 0x43000000).to(tl.float32, bitcast=True)
        sums += value * x[None, :]
        x_sums += x
    return sums - 136.0 * x_sums[None, :]


@triton.jit
def gemv_kernel(
    out_ptr,  # [1, N]
    x_ptr,  # [1, K]
    weight_ptr,  # [N, K], int4: int32 [N, K / 8]
    scales_ptr,  # [N] or [N, K / GROUP], not read for DENSE
    x_scales_ptr,  # fp32 [1], read for FP8_ROWS
    bias_ptr,  # [N], read if HAS_BIAS
    N,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of one iteration
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows < N
    rows = tl.where(inside_n, rows, 0)
    c = tl.arange(0, BLOCK_C)
    num_columns = K // 8 if KIND == INT4_GROUPS else K
    tile_ptr = weight_ptr + rows.to(tl.int64)[:, None] * num_columns + c[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in tl.range(0, num_columns, BLOCK_C, num_stages=STAGES):
        columns = start + c
        inside = columns < num_columns
        tile = tl.load(tile_ptr + start, mask=inside[None, :], other=0.0)
        if KIND == INT4_GROUPS:
            products = _products_of_int4(x_ptr, tile, columns, inside)
            scales = group_scales(scales_ptr, rows, start, K // GROUP, GROUP // 8, BLOCK_N, BLOCK_C)
            acc += products * scales.to(tl.float32)
        else:
            products = tile.to(tl.float32) * tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            if KIND == INT8_GROUPS:
                products *= group_scales(scales_ptr, rows, start, K // GROUP, GROUP, BLOCK_N, BLOCK_C).to(tl.float32)
            acc += products
    y = tl.sum(acc, 1)
    if KIND == INT8_ROWS or KIND == FP8_ROWS:
        y = y * tl.load(scales_ptr + rows).to(tl.float32)
    if KIND == FP8_ROWS:
        y = y * tl.load(x_scales_ptr)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=inside_n)


def launch(kind: int, num_outputs: int) -> dict[str, int]:
    """Two programs a processor at least; some kilobytes of each row in flight."""
    int4 = kind == INT4_GROUPS.value  # in words of eight
    return {
        "BLOCK_N": 8 if num_outputs >= 2048 else 4,
        "BLOCK_C": 256 if int4 else 512,
        "STAGES": 3 if int4 else 4,
        "num_warps": 4,
    }


def gemv(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemv."""
    check(x.is_contiguous() and weight.is_contiguous() and out.is_contiguous(), "x, weight and out must be contiguous")
    num_outputs, num_inputs = weight.shape
    config = launch(DENSE.value, num_outputs)
    gemv_kernel[(triton.cdiv(num_outputs, config["BLOCK_N"]),)](
        out,
        x,
        weight,
        weight,
        weight,
        out if bias is None else bias,
        num_outputs,
        num_inputs,
        KIND=DENSE.value,
        GROUP=0,
        HAS_BIAS=bias is not None,
        **dependent(x),
        **config,
    )
