"""The public functions: tensors in, tensors out, one signature, two implementations (see dispatch.py).

Attention and the movement of keys and values are here; step_ops.py, linear_ops.py and sampling_ops.py hold the rest.
"""

from torch import Tensor

from pagewire_kernels import reference
from pagewire_kernels.checks import (
    check,
    check_attention,
    check_cu_seqlens_q,
    check_pack,
    check_write_kv,
)
from pagewire_kernels.decode_workspace import DecodeWorkspace, decode_workspace
from pagewire_kernels.dispatch import implementation
from pagewire_kernels.int4 import pack_int4, unpack_int4
from pagewire_kernels.linear_ops import gemm_fp8, gemm_gated, gemm_w4, gemm_w8, gemv
from pagewire_kernels.sampling_ops import count_tokens, sample
from pagewire_kernels.sampling_tensors import IN_PROMPT, SamplingTensors
from pagewire_kernels.step_ops import (
    quantize_fp8_rows,
    resolve_input_ids,
    rms_norm_residual,
    rms_norm_residual_fp8,
    rope_write_kv,
    silu_and_mul,
    silu_and_mul_fp8,
)

__all__ = [
    "IN_PROMPT",
    "DecodeWorkspace",
    "SamplingTensors",
    "count_tokens",
    "decode_workspace",
    "gemm_fp8",
    "gemm_gated",
    "gemm_w4",
    "gemm_w8",
    "gemv",
    "implementation",
    "pack_int4",
    "pack_kv",
    "paged_decode",
    "paged_prefill",
    "quantize_fp8_rows",
    "resolve_input_ids",
    "rms_norm",
    "rms_norm_residual",
    "rms_norm_residual_fp8",
    "rope",
    "rope_write_kv",
    "sample",
    "silu_and_mul",
    "silu_and_mul_fp8",
    "unpack_int4",
    "unpack_kv",
    "write_kv",
]

# Plain torch on every device: what TorchRunner, the reference, is made of.
rms_norm = reference.rms_norm
rope = reference.rope


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
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> Tensor:
    """Attention of one query token per sequence, q [B, H, D], over the paged cache. Returns [B, H, D] in q.dtype.

    The query of sequence b sits at position seq_lens[b] - 1 and sees the keys [max(0, seq_len - window), seq_len), all
    of them for window 0. block_tables int32 [B, max_blocks], seq_lens int32 or int64 [B]. Query head h uses kv head
    h // (H // KVH). seq_lens[b] == 0 marks batch padding and gives zeros. Slots outside the visible range are never
    mixed in, whatever they hold.

    An e4m3 cache holds key / k_scale and value / v_scale. With a workspace (and `out`, like q) nothing is allocated and
    the launch depends on shapes alone, so that a captured graph holds for any seq_lens. ValueError: shapes or dtypes
    that do not fit.
    """
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, window)
    check(q.shape[0] == seq_lens.shape[0], f"{q.shape[0]} queries for {seq_lens.shape[0]} sequences")
    check(out is None or (out.shape == q.shape and out.dtype == q.dtype), "out must be like q")
    result: Tensor = implementation(q.device.type).paged_decode(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        scale,
        window,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        workspace=workspace,
    )
    return result


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed chunks, q [T, H, D], over the paged cache. Returns [T, H, D] in q.dtype.

    Sequence s owns the rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] (int32 or int64 [num_seqs + 1], one row is fine); its
    total length, chunk included, is seq_lens[s], and the chunk's keys and values are already in the cache. Row r sits
    at position p = seq_lens[s] - q_len + r and sees the keys (p - window, p], [0, p] for window 0. The rest is as in
    paged_decode. ValueError: shapes or dtypes that do not fit.
    """
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, window)
    check_cu_seqlens_q(cu_seqlens_q, seq_lens.shape[0])
    check(out is None or (out.shape == q.shape and out.dtype == q.dtype), "out must be like q")
    result: Tensor = implementation(q.device.type).paged_prefill(
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens,
        scale,
        window,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    return result


def pack_kv(kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> Tensor:
    """Gather T tokens of layers a to b - 1 from kv_cache [L, 2, num_blocks, block_size, KVH, D] for the wire.

    Returns a contiguous [b - a, 2, T, KVH, D] of the cache's dtype, bit for bit, free of any block layout.
    slot_mapping int64 [T]. ValueError: shapes that do not fit or an empty layer range.
    """
    check_pack(kv_cache, slot_mapping, layers)
    wire: Tensor = implementation(kv_cache.device.type).pack_kv(kv_cache, slot_mapping, layers)
    return wire


def unpack_kv(wire: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> None:
    """Scatter a wire tensor [b - a, 2, T, KVH, D] into kv_cache, in place: the inverse of pack_kv.

    The slot mapping is the receiver's own, so its block size may differ from the sender's. ValueError as in pack_kv.
    """
    check_pack(kv_cache, slot_mapping, layers, wire)
    implementation(kv_cache.device.type).unpack_kv(wire, kv_cache, slot_mapping, layers)
