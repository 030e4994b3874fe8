"""Rows times a quantized weight [N, K], dequantised on the way to the tensor cores: gemm_w8, gemm_w4, gemm_fp8.

The product is computed transposed, weight tile [BLOCK_N, K] times activations [K, BLOCK_M]: the weight is the operand
that wgmma takes from registers, where it is dequantised, and a handful of rows fill the narrow side of the tile, not
the one that must be 64 wide. Where N alone gives too few programs, K is split and a second kernel adds the parts in
order, so equal shapes give equal bits. A single row has a kernel of its own (gemv.py), and
many rows, which are bound by arithmetic, are multiplied by torch: with the weight unpacked (dequantize.py), or in e4m3.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels import gemv
from pagewire_kernels.checks import check
from pagewire_kernels.dependent_launch import dependent
from pagewire_kernels.dequantize import dequantize
from pagewire_kernels.weight_tiles import FP8_ROWS, INT4_GROUPS, INT8_GROUPS, INT8_ROWS, group_scales, int4_to, settled

# Of the kernel here.
MAX_ROWS = 128
MAX_ROWS_FP8 = 64
_MAX_SPLITS = 16
_TILES_PER_GROUP = 8


@triton.jit
def _finish(y, rows, m, scales_ptr, x_scales_ptr, bias_ptr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What the sum is multiplied with at the end; rows and m are broadcast against y."""
    if KIND == INT8_ROWS or KIND == FP8_ROWS:
        y = y * tl.load(scales_ptr + rows).to(tl.float32)
    if KIND == FP8_ROWS:
        y = y * tl.load(x_scales_ptr + m)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    out_ptr,  # [M, N], written if SPLITS == 1
    partial_ptr,  # fp32 [SPLITS, M, N]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], int4: uint8 [N, K / 2]
    scales_ptr,  # [N] or [N, K / GROUP]
    x_scales_ptr,  # fp32 [M], read for FP8_ROWS
    bias_ptr,  # [N], read if HAS_BIAS
    M,
    N,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # stored columns of one iteration
    TILES_PER_GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter computes with the raw bits of bf16 and e4m3: give it fp32
):
    # Programs that run together share a few weight tiles and all rows, which stay in L2.
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    group = pid // (TILES_PER_GROUP * m_tiles)
    group_tiles = tl.minimum(n_tiles - group * TILES_PER_GROUP, TILES_PER_GROUP)
    n_tile = group * TILES_PER_GROUP + (pid % (TILES_PER_GROUP * m_tiles)) % group_tiles
    m_tile = (pid % (TILES_PER_GROUP * m_tiles)) // group_tiles
    rows = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Past the edge the last row is read again, and not stored: loads need no mask.
    inside = (rows < N)[:, None] & (m < M)[None, :]
    rows = tl.minimum(rows, N - 1)
    m = tl.minimum(m, M - 1)

    stored_columns = K // 2 if KIND == INT4_GROUPS else K
    per_split = tl.cdiv(tl.cdiv(stored_columns, BLOCK_C), SPLITS) * BLOCK_C
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, stored_columns)
    c = tl.arange(0, BLOCK_C)
    tile_ptr = weight_ptr + rows.to(tl.int64)[:, None] * stored_columns + c[None, :]
    x_row_ptr = x_ptr + m.to(tl.int64)[None, :] * K
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_C):
        columns = start + c
        inside_k = columns < end
        tile = tl.load(tile_ptr + start, mask=inside_k[None, :], other=0.0)
        if KIND == INT4_GROUPS:
            # A byte holds two inputs, 16 apart (int4.py): low and high halves are multiplied one after the other.
            k = ((columns // 16) * 32 + columns % 16)[:, None]
            scales = group_scales(scales_ptr, rows, start, K // GROUP, GROUP // 2, BLOCK_N, BLOCK_C).to(dtype)
            x = tl.load(x_row_ptr + k, mask=inside_k[:, None], other=0.0).to(dtype)
            acc = tl.dot(int4_to(tile & 15, dtype) * scales, x, acc, input_precision="ieee")
            x = tl.load(x_row_ptr + k + 16, mask=inside_k[:, None], other=0.0).to(dtype)
            acc = settled(tl.dot(int4_to(tile >> 4, dtype) * scales, x, acc, input_precision="ieee"), UPCAST)
        else:
            x = tl.load(x_row_ptr + columns[:, None], mask=inside_k[:, None], other=0.0).to(dtype)
            weight = tile.to(dtype)
            if KIND == INT8_GROUPS:
                weight *= group_scales(scales_ptr, rows, start, K // GROUP, GROUP, BLOCK_N, BLOCK_C).to(dtype)
            acc = tl.dot(weight, x, acc, input_precision="ieee")
            if KIND != FP8_ROWS:  # whose weights are multiplied where they were loaded
                acc = settled(acc, UPCAST)

    offsets = m.to(tl.int64)[None, :] * N + rows[:, None]
    if SPLITS == 1:
        y = _finish(acc, rows[:, None], m[None, :], scales_ptr, x_scales_ptr, bias_ptr, KIND, HAS_BIAS)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def gemm_reduce_kernel(
    out_ptr,  # [M, N]
    partial_ptr,  # fp32 [SPLITS, M, N]
    scales_ptr,  # [N], unless grouped
    x_scales_ptr,  # fp32 [M], read for FP8_ROWS
    bias_ptr,  # [N], read if HAS_BIAS
    M,
    N,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    rows = tl.minimum(rows, N - 1)
    y = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(partial_ptr + (split * M + m) * N + rows)
    y = _finish(y, rows, m, scales_ptr, x_scales_ptr, bias_ptr, KIND, HAS_BIAS)
    tl.store(out_ptr + m * N + rows, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch(kind: int, num_rows: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages for M rows of `itemsize` bytes.

    Of those tried on an H200 the fastest that do not spill on sm_80 (see aot.py): Llama 3 8B's gate_up in int4 takes
    59, 79 and 123 us with 16, 64 and 128 rows.
    """
    block_m = 16 if num_rows <= 16 else min(triton.next_power_of_2(num_rows), 128)
    if itemsize == 4:
        block_n, block_m, block_c, num_warps, num_stages = 32, 16, 32 if kind == INT4_GROUPS.value else 64, 4, 1
    elif kind == INT4_GROUPS.value:  # two inputs in a stored column
        block_n, block_c = 128, 64 if block_m <= 64 else 32
        num_warps, num_stages = (4, 4) if block_m == 16 else (8, 3)
    elif kind == FP8_ROWS.value and block_m == 128:
        block_n, block_c, num_warps, num_stages = 128, 128, 8, 3
    else:
        block_n, block_c, num_warps, num_stages = 64, 128, 4, 4 if block_m <= 64 else 3
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def choose_num_splits(num_tiles: int, num_iterations: int, num_processors: int) -> int:
    """Enough programs to fill the processors twice, each with four iterations at least to run."""
    wanted = min(2 * num_processors // num_tiles, num_iterations // 4, _MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def gemm_w8(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemm_w8."""
    if scales.dim() == 1:
        _multiply(INT8_ROWS.value, x, weight, scales, None, out, bias, 0)
    else:
        _multiply(INT8_GROUPS.value, x, weight, scales, None, out, bias, x.shape[1] // scales.shape[1])


def gemm_w4(x: Tensor, packed: Tensor, scales: Tensor, group: int, out: Tensor, bias: Tensor | None = None) -> None:
    """As ops.gemm_w4."""
    _multiply(INT4_GROUPS.value, x, packed, scales, None, out, bias, group)


def gemm_fp8(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    """As ops.gemm_fp8."""
    # torch's product with a scale for each row gives bfloat16 only, and takes matrices of whole 16-byte rows.
    fits = out.dtype == torch.bfloat16 and weight.shape[0] % 16 == x.shape[1] % 16 == 0
    if fits and len(x) > MAX_ROWS_FP8 and x.is_cuda:
        torch._scaled_mm(
            x, weight.t(), x_scales[:, None], w_scales[None, :], bias, out_dtype=out.dtype, use_fast_accum=True, out=out
        )
        return
    _multiply(FP8_ROWS.value, x, weight, w_scales, x_scales, out, bias, 0)


def _multiply(
    kind: int,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    x_scales: Tensor | None,
    out: Tensor,
    bias: Tensor | None,
    group: int,
    num_splits: int = 0,
) -> None:
    for name, tensor in (("x", x), ("the weight", weight), ("scales", scales), ("out", out)):
        check(tensor.is_contiguous(), f"{name} must be contiguous")
    num_rows, num_inputs = x.shape
    num_outputs, stored_columns = weight.shape
    if num_rows == 0:
        return
    pointers = (scales, scales if x_scales is None else x_scales, out if bias is None else bias)
    if num_rows == 1 and not num_splits:
        config = gemv.launch(kind, num_outputs)
        gemv.gemv_kernel[(triton.cdiv(num_outputs, config["BLOCK_N"]),)](
            out,
            x,
            weight.view(torch.int32) if kind == INT4_GROUPS.value else weight,
            *pointers,
            num_outputs,
            num_inputs,
            KIND=kind,
            GROUP=group,
            HAS_BIAS=bias is not None,
            **dependent(x),
            **config,
        )
        return
    if num_rows > MAX_ROWS and x.is_cuda and kind != FP8_ROWS.value and out.dtype == x.dtype and not num_splits:
        dense = dequantize(kind, weight, scales, num_inputs, group, x.dtype).t()
        torch.mm(x, dense, out=out) if bias is None else torch.addmm(bias, x, dense, out=out)
        return
    config = launch(kind, num_rows, x.element_size())
    tiles = triton.cdiv(num_outputs, config["BLOCK_N"]) * triton.cdiv(num_rows, config["BLOCK_M"])
    iterations = triton.cdiv(stored_columns, config["BLOCK_C"])
    splits = num_splits or choose_num_splits(tiles, iterations, _num_processors(x.device))
    partial = out
    if splits > 1:
        partial = torch.empty(splits, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    common = {"KIND": kind, "HAS_BIAS": bias is not None, "SPLITS": splits}
    gemm_kernel[(tiles, splits)](
        out,
        partial,
        x,
        weight,
        *pointers,
        num_rows,
        num_outputs,
        num_inputs,
        GROUP=group,
        TILES_PER_GROUP=_TILES_PER_GROUP,
        UPCAST=not x.is_cuda,
        **common,
        **config,
    )
    if splits > 1:
        gemm_reduce_kernel[(num_rows, triton.cdiv(num_outputs, 512))](
            out, partial, *pointers, num_rows, num_outputs, BLOCK=512, num_warps=4, **common
        )


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
