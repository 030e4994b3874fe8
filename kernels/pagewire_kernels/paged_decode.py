"""Attention of one query token per sequence over a paged cache, the work divided evenly whatever the lengths.

The keys of every sequence are cut into tiles of BLOCK_N, and the tiles of the whole batch, laid end to end, into equal
runs (stream-K: Osama et al., 2023), with a program for every kv head of a run. So one long sequence fills the GPU as
well as 128 uneven ones do, and the grid knows neither batch nor lengths: a captured graph holds for all. The programs
of a run start together and read the heads of the same tokens, which lie side by side in memory. A program that meets a
sequence from its first tile to its last writes the output; one that meets a part leaves a normalised partial output
with its log-sum-exp, to be weighed (flash-decoding, Dao et al., 2023). Where there are many sequences, most of them in
one part or two, whichever program leaves a sequence's last part adds them all; where there are few, in many parts, that
would be a long tail of few programs, and a second kernel does it. In either case in order of the keys. The softmax is
online (Milakov and Gimelshein, 2018) and in base 2. All query heads that share a kv head ride in one tile, padded to
the 16 rows that tl.dot needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check, check_kernel_layout
from pagewire_kernels.decode_workspace import PROGRAMS_PER_PROCESSOR, DecodeWorkspace, decode_workspace
from pagewire_kernels.dependent_launch import dependent, wait_for_the_kernel_before

REDUCE = {"BLOCK_P": 8, "num_warps": 1}  # of decode_reduce_kernel
_PART_ELEMENTS = 4096  # of the partial outputs that a program of decode_kernel adds at a time
_LOG2_E = 1.4426950408889634


@triton.jit
def _widened(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """In `dtype`, and e4m3 so before it is laid out for a product.

    The second operand of a small product is read from shared memory across its rows. There is an instruction for that
    if elements have 16 bits; e4m3 Triton (3.6, 3.7) reads byte by byte, since it moves conversions behind layouts. Not
    across an instruction that it must leave where it is. (Products of 64 rows and more read shared memory themselves.)
    """
    wide = values.to(dtype)
    if (values.dtype == tl.float8e4nv) & (wide.dtype != tl.float32) & (not INTERPRETED):
        wide = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [wide], dtype=wide.dtype, is_pure=False, pack=2)
    return wide


@triton.jit
def _num_tiles(seq_lens, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of each sequence: of the window if there is one."""
    keys = seq_lens
    if WINDOW > 0:
        keys = tl.minimum(keys, WINDOW)
    return tl.cdiv(keys, BLOCK_N)


# Where a batch's rows begin in a table or a list is another alignment each time, and would be another kernel.
@triton.jit(
    do_not_specialize=["num_seqs", "stride_tb"], do_not_specialize_on_alignment=["block_tables_ptr", "seq_lens_ptr"]
)
def decode_kernel(
    out_ptr,  # [B, H, D]
    partial_ptr,  # fp32 [P, 2, H // KVH, D]
    lse_ptr,  # fp32 [P, 2, H // KVH], base 2
    arrived_ptr,  # int32 [P], zeros: how many parts there are of the sequence that begins in a run and goes on
    q_ptr,  # [B, H, D]
    k_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    v_cache_ptr,  # [num_blocks, BLOCK_SIZE, KVH, D]
    block_tables_ptr,  # int32 [B, max_blocks]
    seq_lens_ptr,  # int [B]
    scale_log2,  # softmax scale * k_scale * log2(e)
    v_scale,
    num_seqs,
    stride_qb,
    stride_kb,
    stride_vb,
    stride_tb,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,  # of one run
    BLOCK_B: tl.constexpr,  # num_seqs, padded
    BLOCK_G: tl.constexpr,  # H // KVH, padded
    BLOCK_D: tl.constexpr,  # D, padded
    BLOCK_N: tl.constexpr,  # keys of one tile
    MERGE: tl.constexpr,  # parts are added here, and rows without keys written
    PART_G: tl.constexpr,  # H // KVH, padded for a sum of parts
    BLOCK_P: tl.constexpr,  # parts of one iteration of that sum
    UPCAST: tl.constexpr,  # the interpreter multiplies the raw bits of bf16: give it fp32
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    program = tl.program_id(0)
    kv_head = program % KVH
    group: tl.constexpr = H // KVH
    b = tl.arange(0, BLOCK_B)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    tile_mask = (g < group)[:, None] & (d < D)[None, :]

    seq_lens = tl.load(seq_lens_ptr + b, mask=b < num_seqs, other=0).to(tl.int32)
    tiles = _num_tiles(seq_lens, WINDOW, BLOCK_N)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    num_runs = tl.num_programs(0) // KVH
    run = tl.maximum(tl.cdiv(total, num_runs), MIN_TILES)
    begin = program // KVH * run
    stop = tl.minimum(begin + run, total)
    at = begin
    while at < stop:
        before = ends <= at
        seq = tl.sum(before.to(tl.int32), 0)
        seq_begin = tl.sum(tl.where(before, tiles, 0), 0)
        seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
        seq_tiles = _num_tiles(seq_len, WINDOW, BLOCK_N)
        first_tile = at - seq_begin
        num_tiles = tl.minimum(seq_tiles - first_tile, stop - at)
        first_key = first_tile * BLOCK_N
        if WINDOW > 0:
            first_key += tl.maximum(seq_len - WINDOW, 0)
        end_key = tl.minimum(first_key + num_tiles * BLOCK_N, seq_len)

        row = seq.to(tl.int64)
        heads = kv_head * group + g
        q = tl.load(q_ptr + row * stride_qb + heads[:, None] * D + d[None, :], mask=tile_mask, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        elif (k_cache_ptr.dtype.element_ty == tl.float8e4nv) & (q.dtype == tl.bfloat16):
            q = q.to(tl.float16)  # e4m3 to fp16 is one instruction, to bf16 five
        table_ptr = block_tables_ptr + row * stride_tb
        row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(first_key, end_key, BLOCK_N):
            keys = start + n
            # The same mask guards K, V and the scores: what lies past the end may be NaN, and 0 * NaN is NaN.
            seen = keys < end_key
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            inside = ((keys % BLOCK_SIZE) * KVH + kv_head) * D
            k_offsets = (blocks * stride_kb + inside)[None, :] + d[:, None]
            k = tl.load(k_cache_ptr + k_offsets, mask=seen[None, :] & (d < D)[:, None], other=0.0)
            v_offsets = (blocks * stride_vb + inside)[:, None] + d[None, :]
            v = tl.load(v_cache_ptr + v_offsets, mask=seen[:, None] & (d < D)[None, :], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # Every tile sees at least one key, so the maximum is finite.
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.exp2(scores - new_max[:, None])
            correction = tl.exp2(row_max - new_max)
            row_sum = row_sum * correction + tl.sum(p, 1)
            v = v.to(q.dtype) if BLOCK_G >= 64 else _widened(v, q.dtype, UPCAST)
            acc = acc * correction[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
            row_max = new_max

        acc = acc * (v_scale / row_sum)[:, None]
        if num_tiles == seq_tiles:
            out_rows = out_ptr + (row * H + heads)[:, None] * D + d[None, :]
            tl.store(out_rows, acc.to(out_ptr.dtype.element_ty), mask=tile_mask)
        else:
            # Only the first and the last that a program meets can be parts.
            slots = (program.to(tl.int64) * 2 + (at != begin).to(tl.int32)) * group + g
            tl.store(partial_ptr + slots[:, None] * D + d[None, :], acc, mask=tile_mask)
            tl.store(lse_ptr + slots, row_max + tl.log2(row_sum), mask=g < group)
            if MERGE:
                first_run = seq_begin // run
                last_run = (seq_begin + seq_tiles - 1) // run
                # One sequence at most begins in a run and goes on beyond it.
                counter_ptr = arrived_ptr + first_run * KVH + kv_head
                tl.debug_barrier()  # all threads have stored
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == last_run - first_run:
                    y = _sum_of_parts(
                        partial_ptr, lse_ptr, first_run, last_run, run, seq_begin, kv_head, tl.arange(0, PART_G),
                        group, KVH, D, BLOCK_D, BLOCK_P,
                    )  # fmt: skip
                    part_g = tl.arange(0, PART_G)[:, None]
                    out_rows = out_ptr + (row * H + kv_head * group + part_g) * D + d[None, :]
                    tl.store(out_rows, y.to(out_ptr.dtype.element_ty), mask=(part_g < group) & (d < D)[None, :])
                    tl.store(counter_ptr, 0)
        at += num_tiles

    if MERGE:
        # Padding rows of length 0, which no program met.
        if tl.sum(((seq_lens == 0) & (b < num_seqs)).to(tl.int32), 0) > 0:
            for seq in range(program // KVH, num_seqs, num_runs):
                if tl.load(seq_lens_ptr + seq) == 0:
                    out_rows = out_ptr + (seq * H + kv_head * group + g)[:, None] * D + d[None, :]
                    tl.store(out_rows, tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit
def _sum_of_parts(
    partial_ptr,
    lse_ptr,
    first_run,
    last_run,
    run,  # tiles of each
    seq_begin,  # the sequence's first tile
    kv_head,
    g,  # [G], heads of the group
    GROUP: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """fp32 [G, BLOCK_D]: the parts of one sequence, weighed by their log-sum-exps.

    Read past L1, which knows nothing of what other processors have just written.
    """
    d = tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    top = tl.full(g.shape, float("-inf"), tl.float32)
    weight_sum = tl.zeros(g.shape, tl.float32)
    acc = tl.zeros([g.shape[0], BLOCK_D], tl.float32)
    for start in range(first_run, last_run + 1, BLOCK_P):
        runs = start + tl.arange(0, BLOCK_P)
        is_part = (runs <= last_run)[:, None]
        runs = tl.minimum(runs, last_run)
        programs = runs.to(tl.int64) * KVH + kv_head
        slots = (programs * 2 + (runs * run < seq_begin).to(tl.int32))[:, None] * GROUP
        slots += tl.minimum(g, GROUP - 1)[None, :]
        lse = tl.load(lse_ptr + slots, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        pointers = partial_ptr + slots[:, :, None] * D + d[None, None, :]
        part = tl.load(pointers, mask=is_part[:, :, None] & inside[None, :, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights = tl.exp2(lse - new_top[None, :])
        correction = tl.exp2(top - new_top)
        weight_sum = weight_sum * correction + tl.sum(weights, 0)
        acc = acc * correction[:, None] + tl.sum(part * weights[:, :, None], 0)
        top = new_top
    return acc / weight_sum[:, None]


@triton.jit(do_not_specialize=["num_seqs", "num_runs"], do_not_specialize_on_alignment=["seq_lens_ptr"])
def decode_reduce_kernel(
    out_ptr,  # [B, H, D]
    partial_ptr,  # fp32 [P, 2, H // KVH, D]
    lse_ptr,  # fp32 [P, 2, H // KVH], base 2
    seq_lens_ptr,  # int [B]
    num_seqs,
    num_runs,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_the_kernel_before()
    seq = tl.program_id(0)
    head = tl.program_id(1)
    group: tl.constexpr = H // KVH
    b = tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    row_ptr = out_ptr + (seq.to(tl.int64) * H + head) * D + d

    seq_tiles = _num_tiles(tl.load(seq_lens_ptr + seq).to(tl.int32), WINDOW, BLOCK_N)
    if seq_tiles == 0:
        # A padding sequence of length 0, which no program met.
        tl.store(row_ptr, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=d < D)
        return
    tiles = _num_tiles(tl.load(seq_lens_ptr + b, mask=b < num_seqs, other=0).to(tl.int32), WINDOW, BLOCK_N)
    run = tl.maximum(tl.cdiv(tl.sum(tiles, 0), num_runs), MIN_TILES)
    begin = tl.sum(tl.where(b < seq, tiles, 0), 0)
    first = begin // run
    last = (begin + seq_tiles - 1) // run
    if first == last:
        return
    y = _sum_of_parts(
        partial_ptr, lse_ptr, first, last, run, begin, head // group, head % group + tl.arange(0, 1),
        group, KVH, D, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    tl.store(row_ptr, tl.reshape(y, [BLOCK_D]).to(out_ptr.dtype.element_ty), mask=d < D)


def launch(head_dim: int, itemsize: int, cache_itemsize: int, group: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages for queries and a cache of so many bytes an element.

    Of 47 tried on an H200 with heads of 128 the fastest: many narrow programs hide each other's gaps between sequences.
    128 sequences of 640 keys take 97 us beside 106 for the best of 128 keys and four warps, over e4m3 76 beside 97.
    fp32 runs without tensor cores and keeps whole rows in registers: with the 16-bit tiles it spilled 300 bytes.
    """
    block_g = max(16, triton.next_power_of_2(group))
    num_warps = 4 if block_g <= 32 else 8
    if itemsize == 4:
        return {"BLOCK_G": block_g, "BLOCK_N": 16, "MIN_TILES": 8, "num_warps": num_warps, "num_stages": 1}
    if _is_narrow(head_dim, itemsize, group):
        block_n, num_warps, num_stages = 64, 2, 2 if cache_itemsize == 2 else 5
    else:
        block_n, num_stages = 64 if head_dim <= 128 else 32, 5
    return {
        "BLOCK_G": block_g,
        "BLOCK_N": block_n,
        "MIN_TILES": 128 // block_n,  # fewer keys do not pay for a partial output
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _is_narrow(head_dim: int, itemsize: int, group: int) -> bool:
    return itemsize == 2 and head_dim <= 128 and group <= 16


def parts(group: int, head_dim: int) -> dict[str, int]:
    """How many parts are added at a time where a program adds them."""
    part_g, block_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    return {"PART_G": part_g, "BLOCK_P": min(16, max(1, _PART_ELEMENTS // (part_g * block_d)))}


def resident_programs(head_dim: int, itemsize: int, group: int) -> int:
    """What a processor holds at once, by the registers and shared memory of aot.py's table."""
    if _is_narrow(head_dim, itemsize, group):
        return PROGRAMS_PER_PROCESSOR
    return 1 if group > 32 else 2


def choose_num_runs(resident: int, num_kv_heads: int, workspace: DecodeWorkspace) -> int:
    """So many that all programs are resident at once: a second wave would idle."""
    return max(1, workspace.partial.shape[0] * resident // PROGRAMS_PER_PROCESSOR // num_kv_heads)


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
    """As ops.paged_decode."""
    check_kernel_layout({"q": q}, {"k_cache": k_cache, "v_cache": v_cache}, q.device)
    check(block_tables.stride(1) == 1, "the rows of block_tables must be contiguous")
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check(out.is_contiguous() and seq_lens.is_contiguous(), "out and seq_lens must be contiguous")
    if batch == 0:
        return out
    workspace = workspace or decode_workspace(num_heads, num_kv_heads, head_dim, q.device)
    group = num_heads // num_kv_heads
    resident = resident_programs(head_dim, q.element_size(), group)
    num_runs = choose_num_runs(resident, num_kv_heads, workspace)
    merge = batch >= num_runs
    config = launch(head_dim, q.element_size(), k_cache.element_size(), group)
    shapes = {
        "H": num_heads,
        "KVH": num_kv_heads,
        "D": head_dim,
        "WINDOW": window,
        "BLOCK_B": triton.next_power_of_2(batch),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    decode_kernel[(num_runs * num_kv_heads,)](
        out,
        workspace.partial,
        workspace.lse,
        workspace.arrived,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        scale * k_scale * _LOG2_E,
        v_scale,
        batch,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=k_cache.shape[1],
        MERGE=merge,
        UPCAST=not q.is_cuda,
        **shapes,
        **parts(group, head_dim),
        **config,
        **dependent(q),
    )
    if not merge:
        decode_reduce_kernel[(batch, num_heads)](
            out,
            workspace.partial,
            workspace.lse,
            seq_lens,
            batch,
            num_runs,
            BLOCK_N=config["BLOCK_N"],
            MIN_TILES=config["MIN_TILES"],
            **REDUCE,
            **shapes,
            **dependent(q),
        )
    return out
