"""Tiles of a quantized weight [N, K] as a kernel reads them: where inputs lie, integers to floats, scales of groups.

Instructions are as scarce as bandwidth: an H200 reads 18 bytes for every cycle of a processor, which has 128 lanes, so
an int4 weight may cost four instructions and an int8 weight seven. Instead of a conversion, the bits of an int4 go into
the mantissa of a power of two, which is then taken away; in 16-bit types one instruction does that for two.
"""

import triton
import triton.language as tl

# How a weight is stored; constexpr KIND of the kernels.
INT8_ROWS = tl.constexpr(0)  # one scale a row, applied to the sum
INT8_GROUPS = tl.constexpr(1)
INT4_GROUPS = tl.constexpr(2)
FP8_ROWS = tl.constexpr(3)
DENSE = tl.constexpr(4)  # as the activations, no scales; gemv only


@triton.jit
def int4_to(nibbles, dtype: tl.constexpr):
    """uint8 of 0 to 15 -> -8 to 7 in fp16, bf16 or fp32."""
    if dtype == tl.bfloat16:
        values = (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif dtype == tl.float16:
        values = (nibbles.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        values = nibbles.to(tl.float32) - 8.0
    return values


@triton.jit
def settled(acc, INTERPRETED: tl.constexpr):
    """acc, once the product it comes from is done.

    A product whose weights come from registers reads them while the program runs on. Left to itself Triton (3.6, 3.7)
    waits only for older products, and the next tile's weights overwrite the registers: on an H100 the sums of 128 rows
    were NaN now and then. Any use of the sum makes it wait; this one costs nothing.
    """
    if not INTERPRETED:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def group_scales(
    scales_ptr,
    rows,
    first_column,
    num_groups,
    STORED: tl.constexpr,  # columns that share a scale
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] of scales [N, num_groups] for columns from first_column on, a multiple of BLOCK_C."""
    groups: tl.constexpr = BLOCK_C // STORED if BLOCK_C > STORED else 1
    g = first_column // STORED + tl.arange(0, groups)
    offsets = rows[:, None].to(tl.int64) * num_groups + g[None, :]
    scales = tl.load(scales_ptr + offsets, mask=(g < num_groups)[None, :], other=0.0)
    wide = tl.broadcast_to(scales[:, :, None], [BLOCK_N, groups, BLOCK_C // groups])
    return tl.reshape(wide, [BLOCK_N, BLOCK_C])
