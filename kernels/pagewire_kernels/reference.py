"""Plain torch for every op: the CPU path, and the oracle the Triton kernels are tested against.

    B sequences    T tokens (packed rows)    H query heads    KVH kv heads    G = H // KVH    D head_dim    S keys

Attention gathers the blocks of a sequence and multiplies head group by head group. Scores, softmax and sums are fp32
whatever the cache holds. torch's scaled_dot_product_attention(enable_gqa=True) repeats K and V for every query head
and was measured four to five times slower at decode on a CPU.

Slots past seq_len and blocks nobody owns may hold NaN, and 0 * NaN is NaN: a masked value row is dropped or zeroed,
never merely weighted by zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one prefill tile: bounds the fp32 scores and lets early rows skip the keys that lie in their future.
_PREFILL_TILE_ROWS = 128
# Sequences share one padded gather while the shortest is at least this part of the longest, or all are this short,
_MIN_FILL = 0.75
_SHORT_SEQ_LEN = 64
# and while the gathered fp32 keys stay small: 16 sequences of 1024 tokens (8 kv heads of 64) took 38 ms as one gather
# of 33 MB and 6 ms one by one; 8 of 128 tokens (3 heads) 0.15 ms together and 0.34 ms one by one. One CPU thread.
_MAX_GATHER_BYTES = 1 << 20


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatter k, v [T, KVH, D] into k_cache, v_cache [num_blocks, block_size, KVH, D] at slot_mapping int64 [T]."""
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if cache.is_contiguous():
            cache.flatten(0, 1).index_copy_(0, slot_mapping, rows)
        else:
            block_size = cache.shape[1]
            cache[slot_mapping // block_size, slot_mapping % block_size] = rows


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attention of one query per sequence, q [B, H, D], at position seq_lens[b] - 1. Returns [B, H, D] in q.dtype.

    Keys are the positions [max(0, seq_len - window), seq_len), or all of them for window 0. A sequence of length 0 is
    batch padding and gives a row of zeros.
    """
    lengths: list[int] = seq_lens.tolist()
    if len(lengths) == 1 and lengths[0] > 0:
        return _attend_one(q, k_cache, v_cache, block_tables[0], lengths[0] - 1, scale, window)
    groups = _groups_of_similar_length(lengths, max_keys=_MAX_GATHER_BYTES // (4 * k_cache[0, 0].numel()))
    if len(groups) == 1 and len(groups[0]) == len(lengths):
        return _decode_group(q, k_cache, v_cache, block_tables, lengths, seq_lens, scale, window)
    out = q.new_zeros(q.shape)
    for group in groups:
        rows = torch.tensor(group, device=q.device)
        if len(group) == 1:
            row = group[0]
            out[row] = _attend_one(
                q[row : row + 1], k_cache, v_cache, block_tables[row], lengths[row] - 1, scale, window
            )[0]
            continue
        attended = _decode_group(
            q[rows],
            k_cache,
            v_cache,
            block_tables[rows],
            [lengths[row] for row in group],
            seq_lens[rows],
            scale,
            window,
        )
        out.index_copy_(0, rows, attended)
    return out


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

    Sequence s owns the rows cu_seqlens_q[s]:cu_seqlens_q[s + 1]; row r of its chunk sits at position
    seq_lens[s] - q_len + r and sees the keys (position - window, position], or [0, position] for window 0. The keys of
    the chunk itself must already be in the cache.
    """
    starts: list[int] = cu_seqlens_q.tolist()
    lengths: list[int] = seq_lens.tolist()
    out = q.new_zeros(q.shape)
    # A step mixes decode rows with chunks; the rows of length one share batched gathers.
    single = [s for s in range(len(lengths)) if starts[s + 1] - starts[s] == 1]
    if len(single) > 1:
        seqs = torch.tensor(single, device=q.device)
        rows = torch.tensor([starts[s] for s in single], device=q.device)
        out[rows] = paged_decode(q[rows], k_cache, v_cache, block_tables[seqs], seq_lens[seqs], scale, window)
    for s, length in enumerate(lengths):
        first_row, end_row = starts[s], starts[s + 1]
        if end_row - first_row == 1 and len(single) > 1:
            continue
        for row in range(first_row, end_row, _PREFILL_TILE_ROWS):
            end = min(row + _PREFILL_TILE_ROWS, end_row)
            position = length - (end_row - row)
            out[row:end] = _attend_one(q[row:end], k_cache, v_cache, block_tables[s], position, scale, window)
    return out


def pack_kv(kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> Tensor:
    """Gather the slots of T tokens from kv_cache [L, 2, num_blocks, block_size, KVH, D] for layers a to b - 1.

    Returns the contiguous canonical wire tensor [b - a, 2, T, KVH, D], which knows no blocks: the receiver scatters it
    through its own slot mapping, whatever its block size.
    """
    cache = kv_cache[layers[0] : layers[1]]
    if cache.is_contiguous():
        return cache.flatten(2, 3).index_select(2, slot_mapping)
    block_size = cache.shape[3]
    return cache[:, :, slot_mapping // block_size, slot_mapping % block_size].contiguous()


def unpack_kv(wire: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layers: tuple[int, int]) -> None:
    """Scatter a wire tensor [b - a, 2, T, KVH, D] into the slots of layers a to b - 1: the inverse of pack_kv."""
    cache = kv_cache[layers[0] : layers[1]]
    if cache.is_contiguous():
        cache.flatten(2, 3).index_copy_(2, slot_mapping, wire)
    else:
        block_size = cache.shape[3]
        cache[:, :, slot_mapping // block_size, slot_mapping % block_size] = wire


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., I] over its root mean square, times weight [I]. Returns x's shape.

    The order of casts is Hugging Face LlamaRMSNorm's: normalise in fp32, cast back to x.dtype, then multiply.
    """
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, KVH, D] by cos, sin [T, D], halves paired as in Hugging Face's rotate_half."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[..., 2 * I] to [..., I]: silu(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _attend_one(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    position: int,
    scale: float,
    window: int,
) -> Tensor:
    """Consecutive rows q [rows, H, D] of one sequence, the first at `position`; block_table [max_blocks].

    Gathers exactly the keys that some row sees, so nothing unwritten is ever read.
    """
    rows, _, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    end = position + rows
    start = max(0, position - window + 1) if window else 0
    first_block = start // block_size
    blocks = block_table[first_block : -(-end // block_size)]
    keep = slice(start - first_block * block_size, end - first_block * block_size)
    # [S, KVH, D] seen as [KVH, S, D]: bmm takes the strides as they are.
    k = k_cache.index_select(0, blocks).flatten(0, 1)[keep].transpose(0, 1).float()
    v = v_cache.index_select(0, blocks).flatten(0, 1)[keep].transpose(0, 1).float()
    grouped = q.view(rows, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = torch.bmm(grouped.float() * scale, k.transpose(1, 2))
    if rows > 1:
        rows_at = torch.arange(position, end, device=q.device).unsqueeze(1)
        keys_at = torch.arange(start, end, device=q.device)
        hidden = keys_at > rows_at
        if window:
            hidden |= keys_at <= rows_at - window
        by_row = scores.view(num_kv_heads, rows, -1, end - start)
        by_row.masked_fill_(hidden.view(1, rows, 1, end - start), float("-inf"))
    attended = torch.bmm(scores.softmax(-1), v)
    return attended.view(num_kv_heads, rows, -1, head_dim).transpose(0, 1).reshape(q.shape).to(q.dtype)


def _decode_group(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: list[int],
    seq_lens: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Sequences of similar length, q [B, H, D], through one gather padded to the longest."""
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    shortest, longest = min(lengths), max(lengths)
    starts = [max(0, length - window) if window else 0 for length in lengths]
    first_block = min(starts) // block_size
    base = first_block * block_size
    blocks = block_tables[:, first_block : -(-longest // block_size)].flatten()
    k = _by_head(k_cache, blocks, batch, longest - base)
    v = _by_head(v_cache, blocks, batch, longest - base)
    scores = torch.bmm((q.float() * scale).reshape(batch * num_kv_heads, -1, head_dim), k.transpose(1, 2))
    if shortest < longest or max(starts) > base:
        # Without a window only the tail past the shortest sequence needs a mask.
        first = base if window else shortest
        at = torch.arange(first, longest, device=q.device)
        ends = seq_lens.unsqueeze(1)
        hidden = at >= ends
        if window:
            hidden |= at < ends - window
        scores.view(batch, num_heads, -1)[..., first - base :].masked_fill_(hidden.unsqueeze(1), float("-inf"))
        v.view(batch, num_kv_heads, -1, head_dim)[:, :, first - base :].masked_fill_(hidden[:, None, :, None], 0.0)
    return torch.bmm(scores.softmax(-1), v).view(q.shape).to(q.dtype)


def _by_head(cache: Tensor, blocks: Tensor, batch: int, num_keys: int) -> Tensor:
    """The blocks of `batch` sequences, int32 [B * blocks of one], as fp32 [B * KVH, num_keys, D]."""
    num_kv_heads, head_dim = cache.shape[2:]
    pages = cache.index_select(0, blocks).view(batch, -1, num_kv_heads, head_dim)[:, :num_keys]
    by_head = torch.empty(batch, num_kv_heads, num_keys, head_dim, dtype=torch.float32, device=cache.device)
    return by_head.copy_(pages.transpose(1, 2)).flatten(0, 1)


def _groups_of_similar_length(lengths: list[int], max_keys: int) -> list[list[int]]:
    """Rows grouped, longest first, so that a padded gather wastes little and holds at most max_keys keys.

    Rows of length 0 are in no group.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        length = lengths[row]
        if length == 0:
            break
        similar = length >= _MIN_FILL * longest or longest <= _SHORT_SEQ_LEN
        if groups and similar and (len(groups[-1]) + 1) * longest <= max_keys:
            groups[-1].append(row)
        else:
            longest = length
            groups.append([row])
    return groups
