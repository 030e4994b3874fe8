"""Rounding to float8 e4m3 inside a kernel, and the scale of a row."""

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x, INTERPRETED: tl.constexpr):
    """fp32 to the nearest e4m3, saturating at 448."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if INTERPRETED:
        # The interpreter loses the carry of a mantissa that rounds up to the next power of two: round beforehand.
        exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        quantum = tl.exp2((tl.maximum(exponent, -6) - 3).to(tl.float32))
        scaled = x / quantum
        whole = tl.floor(scaled)
        rest = scaled - whole
        up = (rest > 0.5) | ((rest == 0.5) & (whole - 2.0 * tl.floor(whole * 0.5) == 1.0))
        x = tl.where(up, whole + 1.0, whole) * quantum
    return x.to(tl.float8e4nv)


@triton.jit
def store_e4m3_row(row_ptr, scale_ptr, y, mask, INTERPRETED: tl.constexpr):
    """y fp32 [BLOCK], zero where masked, over absmax / 448."""
    largest = tl.max(tl.abs(y), 0)
    inverse = tl.div_rn(448.0, tl.where(largest > 0, largest, 448.0))
    tl.store(row_ptr, to_e4m3(y * inverse, INTERPRETED), mask=mask)
    tl.store(scale_ptr, tl.div_rn(largest, 448.0))


def num_warps(block: int) -> int:
    """Of a program that holds `block` elements of a row: sixteen each thread, two 16-byte loads of 16-bit values."""
    return min(max(block // 512, 1), 32)
