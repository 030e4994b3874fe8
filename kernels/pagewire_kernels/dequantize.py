"""An int8 or int4 weight [N, K] in the model's dtype, scales applied: what many rows are multiplied with.

With a few hundred rows a product is bound by arithmetic, and the library's dense one is faster than one that unpacks
weights on the way, by more than it takes to unpack them once (on an H100, 4096 rows: 1.2 ms beside 2.2 with int8 and
4.1 with int4).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.weight_tiles import INT4_GROUPS, INT8_ROWS, group_scales, int4_to


@triton.jit
def dequantize_kernel(
    out_ptr,  # [N, K]
    weight_ptr,  # [N, K], int4: uint8 [N, K / 2]
    scales_ptr,  # [N] or [N, K / GROUP]
    N,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # stored columns
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C)
    stored_columns = K // 2 if KIND == INT4_GROUPS else K
    inside = (rows < N)[:, None] & (columns < stored_columns)[None, :]
    rows = tl.minimum(rows, N - 1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * stored_columns + columns[None, :], mask=inside, other=0)
    out_row_ptr = out_ptr + rows.to(tl.int64)[:, None] * K
    if KIND == INT4_GROUPS:
        scales = group_scales(scales_ptr, rows, first, K // GROUP, GROUP // 2, BLOCK_N, BLOCK_C).to(dtype)
        k = ((columns // 16) * 32 + columns % 16)[None, :]  # see int4.py
        tl.store(out_row_ptr + k, int4_to(tile & 15, dtype) * scales, mask=inside)
        tl.store(out_row_ptr + k + 16, int4_to(tile >> 4, dtype) * scales, mask=inside)
    else:
        if KIND == INT8_ROWS:
            scales = tl.load(scales_ptr + rows)[:, None].to(tl.float32)
        else:
            scales = group_scales(scales_ptr, rows, first, K // GROUP, GROUP, BLOCK_N, BLOCK_C).to(tl.float32)
        tl.store(out_row_ptr + columns[None, :], (tile.to(tl.float32) * scales).to(dtype), mask=inside)


def launch(kind: int) -> dict[str, int]:
    """Four kilobytes of the stored weight and its scales in one program."""
    return {"BLOCK_N": 16, "BLOCK_C": 128 if kind == INT4_GROUPS.value else 256, "num_warps": 4}


def dequantize(kind: int, weight: Tensor, scales: Tensor, num_inputs: int, group: int, dtype: torch.dtype) -> Tensor:
    """[N, num_inputs] in `dtype`."""
    config = launch(kind)
    num_outputs, stored_columns = weight.shape
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.device)
    dequantize_kernel[(triton.cdiv(num_outputs, config["BLOCK_N"]), triton.cdiv(stored_columns, config["BLOCK_C"]))](
        out, weight, scales, num_outputs, num_inputs, KIND=kind, GROUP=group, **config
    )
    return out
