"""Moving keys and values between packed rows and cache slots: write_kv, pack_kv, unpack_kv.

All three are copies of rows of KVH * D contiguous elements whose place in the cache is a slot,
block * block_size + offset. A negative slot is never dereferenced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check, check_kernel_layout

# Elements of one program: 4 to 8 KiB each way keeps the memory system busy without many registers.
_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_tokens"])
def write_kv_kernel(
    k_ptr,  # [T, KVH, D]
    v_ptr,  # [T, KVH, D]
    k_cache_ptr,  # [num_blocks, block_size, KVH, D]
    v_cache_ptr,  # [num_blocks, block_size, KVH, D]
    slot_mapping_ptr,  # int64 [T]
    num_tokens,
    stride_kt,
    stride_vt,
    stride_kb,
    stride_vb,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,  # KVH * D
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    mask = (slots >= 0)[:, None] & (columns < ROW)[None, :]
    inside = ((slots % BLOCK_SIZE) * ROW)[:, None] + columns[None, :]
    blocks = (slots // BLOCK_SIZE)[:, None]
    rows = tokens.to(tl.int64)[:, None]
    k = tl.load(k_ptr + rows * stride_kt + columns[None, :], mask=mask)
    tl.store(k_cache_ptr + blocks * stride_kb + inside, k, mask=mask)
    v = tl.load(v_ptr + rows * stride_vt + columns[None, :], mask=mask)
    tl.store(v_cache_ptr + blocks * stride_vb + inside, v, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def copy_kv_kernel(
    wire_ptr,  # [layers, 2, T, KVH, D], contiguous
    kv_cache_ptr,  # [layers, 2, num_blocks, block_size, KVH, D]
    slot_mapping_ptr,  # int64 [T]
    num_tokens,
    stride_cl,
    stride_ck,
    stride_cb,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,  # KVH * D
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TO_WIRE: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2).to(tl.int64)  # layer * 2 + (0 for keys, 1 for values)
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    mask = (slots >= 0)[:, None] & (columns < ROW)[None, :]
    base = kv_cache_ptr + (plane // 2) * stride_cl + (plane % 2) * stride_ck
    inside = ((slots % BLOCK_SIZE) * ROW)[:, None] + columns[None, :]
    cache = base + (slots // BLOCK_SIZE)[:, None] * stride_cb + inside
    wire = wire_ptr + (plane * num_tokens + tokens)[:, None] * ROW + columns[None, :]
    if TO_WIRE:
        tl.store(wire, tl.load(cache, mask=mask), mask=mask)
    else:
        tl.store(cache, tl.load(wire, mask=mask), mask=mask)


def tile(row: int) -> tuple[int, int]:
    """BLOCK_T, BLOCK_R for rows of `row` elements."""
    block_r = min(triton.next_power_of_2(row), 1024)
    return _TILE_ELEMENTS // block_r, block_r


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """As ops.write_kv."""
    check_kernel_layout({"k": k, "v": v}, {"k_cache": k_cache, "v_cache": v_cache}, k.device)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    row = num_kv_heads * head_dim
    block_t, block_r = tile(row)
    write_kv_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(row, block_r))](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping.contiguous(),
        num_tokens,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        BLOCK_SIZE=k_cache.shape[1],
        ROW=row,
        BLOCK_T=block_t,
        BLOCK_R=block_r,
    )


def pack_kv(kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> Tensor:
    """As ops.pack_kv."""
    num_layers = layers[1] - layers[0]
    shape = (num_layers, 2, slot_mapping.shape[0], *kv_cache.shape[4:])
    wire = torch.empty(shape, dtype=kv_cache.dtype, device=kv_cache.device)
    _copy_kv(wire, kv_cache, slot_mapping, layers, to_wire=True)
    return wire


def unpack_kv(wire: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> None:
    """As ops.unpack_kv. The wire tensor must be contiguous."""
    check(wire.is_contiguous(), f"wire must be contiguous, got strides {wire.stride()}")
    _copy_kv(wire, kv_cache, slot_mapping, layers, to_wire=False)


def _copy_kv(wire: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int], *, to_wire: bool) -> None:
    check_kernel_layout({}, {"kv_cache": kv_cache, "wire": wire}, kv_cache.device)
    check(slot_mapping.device == kv_cache.device, f"slot_mapping is on {slot_mapping.device}")
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    cache = kv_cache[layers[0] : layers[1]]
    row = cache.shape[4] * cache.shape[5]
    block_t, block_r = tile(row)
    grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(row, block_r), 2 * cache.shape[0])
    copy_kv_kernel[grid](
        wire,
        cache,
        slot_mapping.contiguous(),
        num_tokens,
        *cache.stride()[:3],
        BLOCK_SIZE=cache.shape[3],
        ROW=row,
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        TO_WIRE=to_wire,
    )
