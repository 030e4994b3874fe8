"""Argument checks shared by every implementation: a mistake of the caller is a ValueError that names the argument.

They look at shapes and dtypes only, never at the values of a tensor: reading one back would stall a GPU.
"""

import torch
from torch import Tensor

_INTEGER = (torch.int32, torch.int64)
_FP8 = torch.float8_e4m3fn


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_slot_mapping(slot_mapping: Tensor, num_tokens: int | None = None) -> None:
    """slot_mapping is int64 [T]."""
    check(
        slot_mapping.dim() == 1 and slot_mapping.dtype == torch.int64,
        f"slot_mapping must be int64 [T], got {slot_mapping.dtype} {tuple(slot_mapping.shape)}",
    )
    check(
        num_tokens is None or slot_mapping.shape[0] == num_tokens,
        f"slot_mapping has {slot_mapping.shape[0]} entries for {num_tokens} tokens",
    )


def check_write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v [T, KVH, D] fit k_cache, v_cache [num_blocks, block_size, KVH, D] in shape and dtype."""
    check(k.dim() == 3 and k.shape == v.shape, f"k and v must be [T, KVH, D], got {tuple(k.shape)}, {tuple(v.shape)}")
    _check_caches(k_cache, v_cache)
    check(k.shape[1:] == k_cache.shape[2:], f"k is {tuple(k.shape)} but k_cache is {tuple(k_cache.shape)}")
    check(
        k.dtype == v.dtype == k_cache.dtype,
        f"dtypes differ: k {k.dtype}, v {v.dtype}, k_cache {k_cache.dtype}",
    )
    check_slot_mapping(slot_mapping, k.shape[0])


def check_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, window: int
) -> None:
    """q [rows, H, D], caches [num_blocks, block_size, KVH, D], block_tables [B, max_blocks], seq_lens [B]."""
    check(q.dim() == 3, f"q must be [rows, H, D], got {tuple(q.shape)}")
    _check_caches(k_cache, v_cache)
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    check(head_dim == k_cache.shape[3], f"q has head_dim {head_dim}, the cache {k_cache.shape[3]}")
    check(num_heads % num_kv_heads == 0, f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly")
    check(k_cache.dtype in (q.dtype, _FP8), f"dtypes differ: q {q.dtype}, k_cache {k_cache.dtype}")
    check(
        block_tables.dim() == 2 and block_tables.dtype == torch.int32,
        f"block_tables must be int32 [num_seqs, max_blocks], got {block_tables.dtype} {tuple(block_tables.shape)}",
    )
    check(
        seq_lens.dtype in _INTEGER and seq_lens.shape == block_tables.shape[:1],
        f"seq_lens must be int32 or int64 [{block_tables.shape[0]}], got {seq_lens.dtype} {tuple(seq_lens.shape)}",
    )
    check(window >= 0, f"window must be 0 (off) or positive, got {window}")


def check_cu_seqlens_q(cu_seqlens_q: Tensor, num_seqs: int) -> None:
    """cu_seqlens_q is int32 or int64 [num_seqs + 1]."""
    check(
        cu_seqlens_q.dtype in _INTEGER and cu_seqlens_q.shape == (num_seqs + 1,),
        f"cu_seqlens_q must be int32 or int64 [{num_seqs + 1}], got {cu_seqlens_q.dtype} {tuple(cu_seqlens_q.shape)}",
    )


def check_pack(kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int], wire: Tensor | None = None) -> None:
    """kv_cache [L, 2, num_blocks, block_size, KVH, D]; wire [b - a, 2, T, KVH, D] for layers (a, b)."""
    check(
        kv_cache.dim() == 6 and kv_cache.shape[1] == 2,
        f"kv_cache must be [L, 2, num_blocks, block_size, KVH, D], got {tuple(kv_cache.shape)}",
    )
    first, last = layers
    check(0 <= first < last <= kv_cache.shape[0], f"layers {layers} is not a range within {kv_cache.shape[0]} layers")
    check_slot_mapping(slot_mapping)
    if wire is not None:
        expected = (last - first, 2, slot_mapping.shape[0], *kv_cache.shape[4:])
        check(
            tuple(wire.shape) == expected and wire.dtype == kv_cache.dtype,
            f"wire must be {kv_cache.dtype} {expected}, got {wire.dtype} {tuple(wire.shape)}",
        )


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    check(
        k_cache.dim() == 4 and k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype,
        "k_cache and v_cache must both be [num_blocks, block_size, KVH, D] of one dtype, "
        f"got {k_cache.dtype} {tuple(k_cache.shape)}, {v_cache.dtype} {tuple(v_cache.shape)}",
    )


def check_kernel_layout(rows: dict[str, Tensor], caches: dict[str, Tensor], device: torch.device) -> None:
    """What the Triton kernels assume on top: one device, and only the outer dimension of anything strided.

    rows are [T, heads, D] and caches [..., num_blocks, block_size, KVH, D], both by argument name.
    """
    for name, tensor in (rows | caches).items():
        check(tensor.device == device, f"{name} is on {tensor.device}, expected {device}")
    for name, tensor in rows.items():
        check(_packed(tensor, 2), f"the heads of one row of {name} must be contiguous, got strides {tensor.stride()}")
    for name, tensor in caches.items():
        check(_packed(tensor, 3), f"a block of {name} must be contiguous, got strides {tensor.stride()}")


def _packed(tensor: Tensor, num_dims: int) -> bool:
    """Whether the last num_dims dimensions are contiguous; the stride of a dimension of size 1 means nothing."""
    expected = 1
    for size, stride in zip(tensor.shape[: -num_dims - 1 : -1], tensor.stride()[: -num_dims - 1 : -1], strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
