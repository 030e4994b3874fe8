"""The public functions: tensors in, tensors out, one signature, two implementations.

CUDA tensors go to the Triton kernels and CPU tensors to plain torch (reference.py). The choice is made once for each
device type and logged; PAGEWIRE_KERNELS=torch or =triton forces it. Triton on CPU tensors needs TRITON_INTERPRET=1.
Triton is imported only when it is chosen, so a machine without it works.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pagewire_kernels import reference
from pagewire_kernels.checks import (
    check,
    check_attention,
    check_cu_seqlens_q,
    check_pack,
    check_write_kv,
)

logger = logging.getLogger("pagewire.kernels")


@dataclass(frozen=True, slots=True)
class Implementation:
    """The five ops that exist both as Triton kernels and in plain torch."""

    name: str
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    paged_prefill: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    pack_kv: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    unpack_kv: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], None]


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [T, KVH, D] into k_cache, v_cache [num_blocks, block_size, KVH, D], in place.

    slot_mapping int64 [T] holds block * block_size + offset of each token; a slot appears at most once. The caches may
    be views whose outer stride is larger than a block. ValueError: shapes or dtypes that do not fit.
    """
    check_write_kv(k, v, k_cache, v_cache, slot_mapping)
    implementation(k.device.type).write_kv(k, v, k_cache, v_cache, slot_mapping)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attention of one query token per sequence, q [B, H, D], over the paged cache. Returns [B, H, D] in q.dtype.

    The query of sequence b sits at position seq_lens[b] - 1 and sees the keys [max(0, seq_len - window), seq_len), all
    of them for window 0. block_tables int32 [B, max_blocks], seq_lens int32 or int64 [B]. Query head h uses kv head
    h // (H // KVH). seq_lens[b] == 0 marks batch padding and gives zeros. Slots outside the visible range are never
    mixed in, whatever they hold. ValueError: shapes or dtypes that do not fit.
    """
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, window)
    check(q.shape[0] == seq_lens.shape[0], f"{q.shape[0]} queries for {seq_lens.shape[0]} sequences")
    return implementation(q.device.type).paged_decode(q, k_cache, v_cache, block_tables, seq_lens, scale, window)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Causal attention of packed chunks, q [T, H, D], over the paged cache. Returns [T, H, D] in q.dtype.

    Sequence s owns the rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] (int32 or int64 [num_seqs + 1], one row is fine); its
    total length, chunk included, is seq_lens[s], and the chunk's keys and values are already in the cache. Row r sits
    at position p = seq_lens[s] - q_len + r and sees the keys (p - window, p], [0, p] for window 0. The rest is as in
    paged_decode. ValueError: shapes or dtypes that do not fit.
    """
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, window)
    check_cu_seqlens_q(cu_seqlens_q, seq_lens.shape[0])
    return implementation(q.device.type).paged_prefill(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, scale, window
    )


def pack_kv(kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> Tensor:
    """Gather T tokens of layers a to b - 1 from kv_cache [L, 2, num_blocks, block_size, KVH, D] for the wire.

    Returns a contiguous [b - a, 2, T, KVH, D] of the cache's dtype, bit for bit, free of any block layout.
    slot_mapping int64 [T]. ValueError: shapes that do not fit or an empty layer range.
    """
    check_pack(kv_cache, slot_mapping, layers)
    return implementation(kv_cache.device.type).pack_kv(kv_cache, slot_mapping, layers)


def unpack_kv(wire: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> None:
    """Scatter a wire tensor [b - a, 2, T, KVH, D] into kv_cache, in place: the inverse of pack_kv.

    The slot mapping is the receiver's own, so its block size may differ from the sender's. ValueError as in pack_kv.
    """
    check_pack(kv_cache, slot_mapping, layers, wire)
    implementation(kv_cache.device.type).unpack_kv(wire, kv_cache, slot_mapping, layers)


# Torch on every device for now: memory-bound, and one launch each would not change a decode step.
rms_norm = reference.rms_norm
rope = reference.rope
silu_and_mul = reference.silu_and_mul


@functools.cache
def implementation(device_type: str) -> Implementation:
    """The implementation for tensors on `device_type` ("cuda", "cpu"), chosen and logged on the first call.

    RuntimeError: PAGEWIRE_KERNELS holds an unknown value, or asks for Triton where it cannot run.
    """
    forced = os.environ.get("PAGEWIRE_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise RuntimeError(f"PAGEWIRE_KERNELS={forced!r}: expected 'torch' or 'triton'")
    installed = importlib.util.find_spec("triton") is not None
    if forced == "triton":
        if not installed:
            raise RuntimeError("PAGEWIRE_KERNELS=triton, but triton is not installed")
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("PAGEWIRE_KERNELS=triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if forced == "triton" or (not forced and device_type == "cuda" and installed):
        logger.info("%s tensors: Triton kernels", device_type)
        return _triton()
    if device_type == "cuda" and not forced:
        logger.warning("cuda tensors: triton is not installed, falling back to plain torch, which is much slower")
    else:
        logger.info("%s tensors: plain torch%s", device_type, " (forced by PAGEWIRE_KERNELS)" if forced else "")
    return _torch()


def _torch() -> Implementation:
    return Implementation(
        "torch",
        reference.write_kv,
        reference.paged_decode,
        reference.paged_prefill,
        reference.pack_kv,
        reference.unpack_kv,
    )


def _triton() -> Implementation:
    from pagewire_kernels import kv_copy, paged_decode, paged_prefill

    return Implementation(
        "triton",
        kv_copy.write_kv,
        paged_decode.paged_decode,
        paged_prefill.paged_prefill,
        kv_copy.pack_kv,
        kv_copy.unpack_kv,
    )
