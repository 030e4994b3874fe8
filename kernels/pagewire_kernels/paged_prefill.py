"""Causal attention of packed prompt chunks over a paged cache.

FlashAttention-2 (Dao, 2023) with keys and values found through the block table. One program takes BLOCK_M rows of one
sequence and kv head: the query heads that share the kv head are interleaved with the tokens, row m being token m // G
and head m % G, so any group size fills the tile. The grid is an upper bound computed from shapes alone; a program finds
its sequence by binary search, the scheme of vLLM's unified Triton attention, so the host never reads cu_seqlens_q back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check, check_kernel_layout

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tile(
    q,
    row_max,
    row_sum,
    acc,
    keys,
    end,
    positions,
    kv_head,
    d,
    table_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scale_log2,
    stride_kb,
    stride_vb,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,  # some row does not see some key
):
    """One online softmax step over `keys` [BLOCK_N]; MASKED: those before `end` that each row's position sees."""
    inside_d = d < D
    if MASKED:
        written = keys < end
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        k_mask = written[None, :] & inside_d[:, None]
        v_mask = written[:, None] & inside_d[None, :]
    else:
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        k_mask = inside_d[:, None]
        v_mask = inside_d[None, :]
    inside = ((keys % BLOCK_SIZE) * KVH + kv_head) * D
    k = tl.load(k_cache_ptr + (blocks * stride_kb + inside)[None, :] + d[:, None], mask=k_mask, other=0.0)
    v = tl.load(v_cache_ptr + (blocks * stride_vb + inside)[:, None] + d[None, :], mask=v_mask, other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
    if MASKED:
        seen = (keys < end)[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe_max = new_max
    if WINDOW > 0:
        # A row whose window starts further on has seen nothing yet: -inf - -inf would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - safe_max[:, None])
    correction = tl.exp2(row_max - safe_max)
    row_sum = row_sum * correction + tl.sum(p, 1)
    acc = acc * correction[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit(
    do_not_specialize=["num_seqs", "stride_tb"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_seqlens_q_ptr", "seq_lens_ptr"],  # see paged_decode.py
)
def prefill_kernel(
    out_ptr,  # [T, H, D]
    q_ptr,  # [T, H, D]
    k_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    v_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    block_tables_ptr,  # int32 [num_seqs, max_blocks]
    cu_seqlens_q_ptr,  # int [num_seqs + 1]
    seq_lens_ptr,  # int [num_seqs]
    scale_log2,  # softmax scale * k_scale * log2(e)
    v_scale,
    num_seqs,
    stride_qt,
    stride_kb,
    stride_vb,
    stride_tb,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows: BLOCK_T tokens times H // KVH heads, and a remainder that idles
    BLOCK_T: tl.constexpr,  # tokens of one program
    BLOCK_D: tl.constexpr,  # D, padded
    BLOCK_N: tl.constexpr,  # keys of one iteration
    UPCAST: tl.constexpr,  # the interpreter multiplies the raw bits of bf16: give it fp32
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    group: tl.constexpr = H // KVH

    # Sequence s starts at tile cu_seqlens_q[s] // BLOCK_T + s, which leaves it at least the tiles it needs.
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q_ptr + middle) // BLOCK_T + middle <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    first_row = tl.load(cu_seqlens_q_ptr + seq).to(tl.int32)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1).to(tl.int32) - first_row
    first_token = (tile - (first_row // BLOCK_T + seq)) * BLOCK_T
    if first_token >= q_len:
        return
    context_len = tl.load(seq_lens_ptr + seq).to(tl.int32) - q_len

    m_index = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    tokens = first_token + m_index // group
    heads = kv_head * group + m_index % group
    row_mask = (m_index < BLOCK_T * group) & (tokens < q_len)
    tile_mask = row_mask[:, None] & (d < D)[None, :]
    rows = (first_row + tokens).to(tl.int64)
    q = tl.load(q_ptr + (rows * stride_qt + heads * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    elif (k_cache_ptr.dtype.element_ty == tl.float8e4nv) & (q.dtype == tl.bfloat16):
        q = q.to(tl.float16)  # as paged_decode.py

    # Keys that some row of this tile sees: all of them are written, so V holds no NaN but past `end`.
    positions = context_len + tokens
    end = context_len + tl.minimum(first_token + BLOCK_T, q_len)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context_len + first_token - WINDOW + 1, 0)

    table_ptr = block_tables_ptr + seq * stride_tb
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Most tiles of a long context are seen whole by every row, and need no mask at all.
    whole = begin
    if WINDOW == 0:
        whole = (context_len + first_token + 1) // BLOCK_N * BLOCK_N
    for start in range(begin, whole, BLOCK_N):
        row_max, row_sum, acc = _attend_tile(
            q,
            row_max,
            row_sum,
            acc,
            start + n,
            end,
            positions,
            kv_head,
            d,
            table_ptr,
            k_cache_ptr,
            v_cache_ptr,
            scale_log2,
            stride_kb,
            stride_vb,
            KVH,
            D,
            BLOCK_SIZE,
            WINDOW,
            False,
        )
    for start in range(whole, end, BLOCK_N):
        row_max, row_sum, acc = _attend_tile(
            q,
            row_max,
            row_sum,
            acc,
            start + n,
            end,
            positions,
            kv_head,
            d,
            table_ptr,
            k_cache_ptr,
            v_cache_ptr,
            scale_log2,
            stride_kb,
            stride_vb,
            KVH,
            D,
            BLOCK_SIZE,
            WINDOW,
            True,
        )

    acc = acc * (v_scale / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
    tl.store(out_ptr + ((rows * H + heads) * D)[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=tile_mask)


def launch(head_dim: int, itemsize: int, group: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages, without spills on sm_90 (see aot.py).

    Of 12 tried on an H100 with heads of 128, 64 rows and keys in four warps are the fastest: two programs fit on a
    processor, one of which multiplies while the other takes its exponentials (0.42 ms for 4096 tokens, 0.74 for 1024 of
    16384; 128 rows in eight warps: 0.47 and 0.92). fp32 runs without tensor cores and keeps whole rows in registers:
    with 32 keys it spilled 350 bytes.
    """
    if itemsize == 4:
        block_m, block_n, num_warps, num_stages = 32 if head_dim <= 128 else 16, 16, 8, 1
    elif head_dim <= 128:
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 2
    else:
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 3
    if block_m < group:
        block_m, num_warps = triton.next_power_of_2(group), 8
    return {
        "BLOCK_M": block_m,
        "BLOCK_T": block_m // group,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


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
    """As ops.paged_prefill."""
    check_kernel_layout({"q": q}, {"k_cache": k_cache, "v_cache": v_cache}, q.device)
    check(block_tables.stride(1) == 1, "the rows of block_tables must be contiguous")
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check(out.is_contiguous(), "out must be contiguous")
    if num_tokens == 0:
        return out
    config = launch(head_dim, q.element_size(), num_heads // num_kv_heads)
    prefill_kernel[(num_tokens // config["BLOCK_T"] + num_seqs, num_kv_heads)](
        out,
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens,
        scale * k_scale * _LOG2_E,
        v_scale,
        num_seqs,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_tables.stride(0),
        H=num_heads,
        KVH=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        UPCAST=not q.is_cuda,
        **config,
    )
    return out
