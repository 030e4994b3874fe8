"""Attention of one query token per sequence over a paged cache, the keys of a sequence split over several programs.

Flash-decoding (Dao et al., "Flash-Decoding for long-context inference", 2023): one program attends to one slice of one
sequence's keys for one kv head and leaves a normalised partial output with its log-sum-exp; a second kernel weighs the
partials. Few sequences with long contexts fill the GPU that way. The softmax is online (Milakov and Gimelshein, 2018)
and in base 2. All query heads that share a kv head ride in one tile, padded to the 16 rows that tl.dot needs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check, check_kernel_layout

_LOG2_E = 1.4426950408889634
# A split of fewer keys does not pay for its partial; more splits than this make the second kernel the slow one.
_MIN_SPLIT_KEYS = 256
_MAX_SPLITS = 32


@triton.jit(do_not_specialize=["stride_tb"])
def decode_split_kernel(
    out_ptr,  # [B, H, D], written if SPLITS == 1
    partial_ptr,  # fp32 [B, H, SPLITS, D]
    lse_ptr,  # fp32 [B, H, SPLITS], base 2
    q_ptr,  # [B, H, D]
    k_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    v_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    block_tables_ptr,  # int32 [B, max_blocks]
    seq_lens_ptr,  # int [B]
    scale_log2,  # softmax scale * log2(e)
    stride_qb,
    stride_kb,
    stride_vb,
    stride_tb,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,  # H // KVH, padded
    BLOCK_D: tl.constexpr,  # D, padded
    BLOCK_N: tl.constexpr,  # keys of one iteration
    UPCAST: tl.constexpr,  # the interpreter multiplies the raw bits of bf16: give it fp32
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    group: tl.constexpr = H // KVH

    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(seq_len - WINDOW, 0)
    split_len = tl.cdiv(tl.cdiv(seq_len - first_key, SPLITS), BLOCK_N) * BLOCK_N
    begin = first_key + split * split_len
    end = tl.minimum(begin + split_len, seq_len)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    heads = kv_head * group + g
    head_mask = g < group
    tile_mask = head_mask[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + seq * stride_qb + heads[:, None] * D + d[None, :], mask=tile_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + n
        # The same mask guards K, V and the scores: what lies past the end may be NaN, and 0 * NaN is NaN.
        seen = keys < end
        blocks = tl.load(block_tables_ptr + seq * stride_tb + keys // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        inside = ((keys % BLOCK_SIZE) * KVH + kv_head) * D
        k_offsets = (blocks * stride_kb + inside)[None, :] + d[:, None]
        k = tl.load(k_cache_ptr + k_offsets, mask=seen[None, :] & (d < D)[:, None], other=0.0)
        v_offsets = (blocks * stride_vb + inside)[:, None] + d[None, :]
        v = tl.load(v_cache_ptr + v_offsets, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Every iteration sees at least one key, so the maximum is finite.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        row_max = new_max

    # An empty split has row_sum == 0 and row_max == -inf: it leaves zeros with no weight.
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    acc = acc / divisor[:, None]
    if SPLITS == 1:
        tl.store(
            out_ptr + (seq * H + heads)[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=tile_mask
        )
    else:
        rows = (seq * H + heads) * SPLITS + split
        tl.store(partial_ptr + rows[:, None] * D + d[None, :], acc, mask=tile_mask)
        tl.store(lse_ptr + rows, row_max + tl.log2(divisor), mask=head_mask)


@triton.jit
def decode_reduce_kernel(
    out_ptr,  # [B, H, D]
    partial_ptr,  # fp32 [B, H, SPLITS, D]
    lse_ptr,  # fp32 [B, H, SPLITS], base 2
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * SPLITS + split)
    # A padding sequence of length 0 has no keys in any split.
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    partial = tl.load(partial_ptr + (row * SPLITS + split)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def launch(head_dim: int, itemsize: int, group: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages, chosen by compiling: no spills on sm_80, 90 and 100 (see aot.py).

    fp32 runs without tensor cores and keeps whole rows in registers: with the 16-bit tiles it spilled 300 bytes.
    """
    block_g = max(16, triton.next_power_of_2(group))
    num_warps = 4 if block_g <= 32 else 8
    if itemsize == 4:
        return {"BLOCK_G": block_g, "BLOCK_N": 16, "num_warps": num_warps, "num_stages": 1}
    return {"BLOCK_G": block_g, "BLOCK_N": 64 if head_dim <= 128 else 32, "num_warps": num_warps, "num_stages": 3}


def choose_num_splits(num_programs: int, max_keys: int, num_processors: int) -> int:
    """A power of two that gives each processor about two programs, without splits of a few keys."""
    wanted = triton.cdiv(2 * num_processors, num_programs)
    useful = triton.cdiv(max_keys, _MIN_SPLIT_KEYS)
    num_splits: int = triton.next_power_of_2(max(1, min(wanted, useful, _MAX_SPLITS)))
    return num_splits


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    num_splits: int = 0,
) -> Tensor:
    """As ops.paged_decode; num_splits is a power of two, 0 to choose it.

    The choice reads shapes, never seq_lens, so that nothing waits for the GPU and the launch can be captured in a CUDA
    graph: pass block_tables no wider than the batch needs.
    """
    check_kernel_layout({"q": q}, {"k_cache": k_cache, "v_cache": v_cache}, q.device)
    check(block_tables.stride(1) == 1, "the rows of block_tables must be contiguous")
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    if num_splits == 0:
        max_keys = block_tables.shape[1] * block_size
        max_keys = min(max_keys, window) if window else max_keys
        num_splits = choose_num_splits(batch * num_kv_heads, max_keys, _num_processors(q.device))
    partial, lse = out, out
    if num_splits > 1:
        partial = torch.empty(batch, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    decode_split_kernel[(batch, num_kv_heads, num_splits)](
        out,
        partial,
        lse,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        scale * _LOG2_E,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_tables.stride(0),
        H=num_heads,
        KVH=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        SPLITS=num_splits,
        BLOCK_D=block_d,
        UPCAST=not q.is_cuda,
        **launch(head_dim, q.element_size(), num_heads // num_kv_heads),
    )
    if num_splits > 1:
        decode_reduce_kernel[(batch * num_heads,)](
            out, partial, lse, D=head_dim, SPLITS=num_splits, BLOCK_D=block_d, num_warps=4
        )
    return out


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
