"""From the fused qkv projection to rotated queries and a written cache, in one launch.

A program takes BLOCK_H heads of one token, all of them q, k or v, as two halves of D / 2 columns: the pairs that a
rotation mixes lie at the same place of the two. q and k never go back to memory between norm, rotation and cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check, check_kernel_layout
from pagewire_kernels.dependent_launch import dependent, wait_for_the_kernel_before
from pagewire_kernels.e4m3 import to_e4m3

_TILE_ELEMENTS = 1024  # pairs of one program


@triton.jit
def _rotated(x_ptr, norm_ptr, table_ptr, eps, half, mask, D: tl.constexpr, NORM: tl.constexpr):
    """Both halves fp32 of heads at x_ptr [BLOCK_H, 1], through the roundings of the model's dtype."""
    first = tl.load(x_ptr + half[None, :], mask=mask, other=0.0)
    second = tl.load(x_ptr + D // 2 + half[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    inside = half < D // 2
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]
        first_weight = tl.load(norm_ptr + half, mask=inside, other=0.0).to(tl.float32)
        second_weight = tl.load(norm_ptr + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
        first = ((first * scale).to(dtype).to(tl.float32) * first_weight[None, :]).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * second_weight[None, :]).to(dtype).to(tl.float32)
    cos = tl.load(table_ptr + half, mask=inside, other=0.0)[None, :]
    sin = tl.load(table_ptr + D // 2 + half, mask=inside, other=0.0)[None, :]
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _write(cache_ptr, value, scale, mask, FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    if FP8:
        tl.store(cache_ptr, to_e4m3(value.to(tl.float32) / scale, INTERPRETED), mask=mask)
    else:
        tl.store(cache_ptr, value, mask=mask)


@triton.jit(do_not_specialize=["eps", "k_scale", "v_scale"])
def rope_write_kv_kernel(
    q_out_ptr,  # [T, H, D]
    k_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    v_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    qkv_ptr,  # [T, H + 2 * KVH, D]
    positions_ptr,  # int [T]
    cos_sin_ptr,  # fp32 [max_positions, D]
    q_norm_ptr,  # [D], read if Q_NORM
    k_norm_ptr,  # [D], read if K_NORM
    slot_mapping_ptr,  # int [T]
    eps,
    k_scale,
    v_scale,
    stride_qkv,
    stride_kb,
    stride_vb,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # D // 2, padded
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    kv_blocks: tl.constexpr = (KVH + BLOCK_H - 1) // BLOCK_H
    h = tl.arange(0, BLOCK_H)
    half = tl.arange(0, BLOCK_HALF)
    inside = (half < D // 2)[None, :]
    row_ptr = qkv_ptr + token * stride_qkv
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * D
    if block < q_blocks:
        heads = block * BLOCK_H + h
        mask = (heads < H)[:, None] & inside
        first, second = _rotated(row_ptr + heads[:, None] * D, q_norm_ptr, table_ptr, eps, half, mask, D, Q_NORM)
        to = q_out_ptr + (token * H + heads)[:, None] * D + half[None, :]
        tl.store(to, first, mask=mask)
        tl.store(to + D // 2, second, mask=mask)
        return
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    if block < q_blocks + kv_blocks:
        heads = (block - q_blocks) * BLOCK_H + h
        mask = (heads < KVH)[:, None] & inside
        k_ptr = row_ptr + (H + heads)[:, None] * D
        first, second = _rotated(k_ptr, k_norm_ptr, table_ptr, eps, half, mask, D, K_NORM)
        cache_ptr = k_cache_ptr + (slot // BLOCK_SIZE) * stride_kb + (slot % BLOCK_SIZE) * KVH * D
        to = cache_ptr + heads[:, None] * D + half[None, :]
        _write(to, first, k_scale, mask, FP8, INTERPRETED)
        _write(to + D // 2, second, k_scale, mask, FP8, INTERPRETED)
    else:
        heads = (block - q_blocks - kv_blocks) * BLOCK_H + h
        mask = (heads < KVH)[:, None] & inside
        v_ptr = row_ptr + (H + KVH + heads)[:, None] * D + half[None, :]
        cache_ptr = v_cache_ptr + (slot // BLOCK_SIZE) * stride_vb + (slot % BLOCK_SIZE) * KVH * D
        to = cache_ptr + heads[:, None] * D + half[None, :]
        _write(to, tl.load(v_ptr, mask=mask), v_scale, mask, FP8, INTERPRETED)
        _write(to + D // 2, tl.load(v_ptr + D // 2, mask=mask), v_scale, mask, FP8, INTERPRETED)


def launch(num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Heads of one program: no more than there are kv heads, so that few lanes idle."""
    block_half = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_kv_heads), max(1, _TILE_ELEMENTS // block_half))
    return {
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
        "num_warps": min(4, max(1, block_h * block_half // 256)),
    }


def rope_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """As ops.rope_write_kv; rows of qkv and blocks of the caches may have gaps between them."""
    check_kernel_layout({}, {"k_cache": k_cache, "v_cache": v_cache}, qkv.device)
    check(qkv.stride(1) == 1 and q_out.is_contiguous(), "rows of qkv and q_out must be contiguous")
    check(cos_sin.is_contiguous() and positions.is_contiguous(), "cos_sin and positions must be contiguous")
    check(k_cache.dtype == v_cache.dtype, f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}")
    num_tokens, num_heads, head_dim = q_out.shape
    num_kv_heads = k_cache.shape[2]
    if num_tokens == 0:
        return
    config = launch(num_kv_heads, head_dim)
    kv_blocks = triton.cdiv(num_kv_heads, config["BLOCK_H"])
    rope_write_kv_kernel[(num_tokens, triton.cdiv(num_heads, config["BLOCK_H"]) + 2 * kv_blocks)](
        q_out,
        k_cache,
        v_cache,
        qkv,
        positions,
        cos_sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        slot_mapping.contiguous(),
        eps,
        k_scale,
        v_scale,
        qkv.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        H=num_heads,
        KVH=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=k_cache.shape[1],
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        FP8=k_cache.dtype != qkv.dtype,
        INTERPRETED=not qkv.is_cuda,
        **dependent(qkv),
        **config,
    )
