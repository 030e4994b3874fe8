"""The last launch of the choice of tokens (sample.py): one program for each row takes the first largest, or draws."""

import triton
import triton.language as tl

from pagewire_kernels.sample_weights import NO_TOKEN, NUM_THRESHOLDS, relative_probabilities

ONE = tl.constexpr(0x3F800000)  # the bits of p = 1


@triton.jit
def _reaching(list_p_ptr, num_listed, key, BLOCK_L: tl.constexpr):
    """How many of the listed p have bits >= key, and their sum."""
    count = 0
    mass = tl.zeros([], tl.float64)
    for start in range(0, num_listed, BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        p = tl.load(list_p_ptr + i, mask=i < num_listed, other=0.0)
        reached = (p.to(tl.int32, bitcast=True) >= key) & (i < num_listed)
        count += tl.sum(reached.to(tl.int32), 0)
        mass += tl.sum(tl.where(reached, p, 0.0).to(tl.float64), 0)
    return count, mass


@triton.jit
def _copy_candidates(list_p_ptr, list_id_ptr, scaled_ptr, chunk_max_ptr, num_chunks, top, cut, V, CHUNK: tl.constexpr):
    """The tokens with 0 < p >= cut of one row, in order; returns how many."""
    num_listed = 0
    for chunk in range(num_chunks):
        # A little more, since approximations of neighbouring values need not be in order.
        if tl.exp(tl.load(chunk_max_ptr + chunk) - top) * 1.00001 >= cut:
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            p = relative_probabilities(tl.load(scaled_ptr + ids, mask=ids < V, other=float("-inf")), top)
            keep = (p >= cut) & (p > 0.0)
            at = num_listed + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(list_p_ptr + at, p, mask=keep)
            tl.store(list_id_ptr + at, ids, mask=keep)
            num_listed += tl.sum(keep.to(tl.int32), 0)
    # Other threads of this program read what was stored.
    tl.debug_barrier()
    return num_listed


@triton.jit
def _top_k(list_p_ptr, num_listed, key, k, BLOCK_L: tl.constexpr):
    """The bits of the k-th largest p, how many that equal it are within the k, and the mass of the k.

    key: bits that k of the listed reach.
    """
    above = tl.full([], ONE + 1, tl.int32)
    while above - key > 1:
        middle = (key + above) // 2
        count, _ = _reaching(list_p_ptr, num_listed, middle, BLOCK_L)
        key = tl.where(count >= k, middle, key)
        above = tl.where(count >= k, above, middle)
    count, mass = _reaching(list_p_ptr, num_listed, key + 1, BLOCK_L)
    limit = k - count
    return key, limit, mass + limit.to(tl.float64) * key.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _top_p(list_p_ptr, num_listed, key, limit, mass_wanted, BLOCK_L: tl.constexpr):
    """The smallest bits, `key` or more, with less than mass_wanted above, and how many that equal it are kept."""
    # At least one token is kept: no mass at all is above p = 1.
    mass_wanted = tl.maximum(mass_wanted, 1e-300)
    lowest = key
    below = key - 1
    key = tl.full([], ONE, tl.int32)
    while key - below > 1:
        middle = (below + key) // 2
        _, mass = _reaching(list_p_ptr, num_listed, middle + 1, BLOCK_L)
        below = tl.where(mass < mass_wanted, below, middle)
        key = tl.where(mass < mass_wanted, middle, key)
    _, mass = _reaching(list_p_ptr, num_listed, key + 1, BLOCK_L)
    # The r-th of equals is kept if the mass ranked above it is less than what is wanted.
    p = tl.maximum(key.to(tl.float32, bitcast=True).to(tl.float64), 1e-300)
    kept = tl.minimum(tl.ceil(tl.minimum((mass_wanted - mass) / p, 1e9)).to(tl.int32), NO_TOKEN)
    return key, tl.where(key == lowest, tl.minimum(limit, kept), kept)


@triton.jit
def _kept(list_p_ptr, start, num_listed, key, limit, num_equal, BLOCK_L: tl.constexpr):
    """p of one block of the list, 0 where left out; num_equal: of the blocks before."""
    i = start + tl.arange(0, BLOCK_L)
    p = tl.load(list_p_ptr + i, mask=i < num_listed, other=0.0)
    bits = p.to(tl.int32, bitcast=True)
    equal = ((bits == key) & (i < num_listed)).to(tl.int32)
    rank = num_equal + tl.cumsum(equal, 0) - equal
    keep = (bits > key) | ((equal != 0) & (rank < limit))
    return tl.where(keep, p, 0.0), num_equal + tl.sum(equal, 0)


@triton.jit
def _draw_from_list(list_p_ptr, list_id_ptr, num_listed, key, limit, uniform, BLOCK_L: tl.constexpr):
    """The token where the cumulative mass of what is kept first exceeds uniform * total."""
    total = tl.zeros([], tl.float64)
    num_equal = 0
    for start in range(0, num_listed, BLOCK_L):
        p, num_equal = _kept(list_p_ptr, start, num_listed, key, limit, num_equal, BLOCK_L)
        total += tl.sum(p.to(tl.float64), 0)
    target = uniform * total
    token = tl.full([], NO_TOKEN, tl.int32)
    last = tl.full([], 0, tl.int32)
    cumulative = tl.zeros([], tl.float64)
    num_equal = 0
    for start in range(0, num_listed, BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        p, num_equal = _kept(list_p_ptr, start, num_listed, key, limit, num_equal, BLOCK_L)
        ids = tl.load(list_id_ptr + i, mask=i < num_listed, other=0)
        beyond = (cumulative + tl.cumsum(p.to(tl.float64), 0) > target) & (p > 0.0)
        token = tl.minimum(token, tl.min(tl.where(beyond, ids, NO_TOKEN), 0))
        last = tl.maximum(last, tl.max(tl.where(p > 0.0, ids, 0), 0))
        cumulative += tl.sum(p.to(tl.float64), 0)
    # The product may round up to the total itself: then the last possible token is meant.
    return tl.minimum(token, last)


@triton.jit
def _draw_from_all(scaled_ptr, sums, c, top, uniform, V, CHUNK: tl.constexpr):
    """As _draw_from_list where nothing is left out: the chunk by the sums of chunks [BLOCK_C], then within it."""
    target = uniform * tl.sum(sums, 0)
    chunk = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(sums > 0.0, c, 0), 0))
    before = tl.sum(tl.where(c < chunk, sums, 0.0), 0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    p = relative_probabilities(tl.load(scaled_ptr + ids, mask=ids < V, other=float("-inf")), top)
    beyond = (before + tl.cumsum(p.to(tl.float64), 0) > target) & (p > 0.0)
    token = tl.min(tl.where(beyond, ids, NO_TOKEN), 0)
    return tl.minimum(token, tl.max(tl.where(p > 0.0, ids, 0), 0))


@triton.jit
def _sufficient_cut(counts_ptr, masses_ptr, num_chunks, k, mass_wanted, BLOCK_C: tl.constexpr):
    """The largest of the fixed thresholds that keeps k tokens (0: any) and mass_wanted."""
    at = tl.arange(0, BLOCK_C)[:, None] * NUM_THRESHOLDS + tl.arange(0, NUM_THRESHOLDS)[None, :]
    inside = at < num_chunks * NUM_THRESHOLDS
    count = tl.sum(tl.load(counts_ptr + at, mask=inside, other=0), 0)
    mass = tl.sum(tl.load(masses_ptr + at, mask=inside, other=0.0).to(tl.float64), 0)
    j = tl.arange(0, NUM_THRESHOLDS)
    enough = (count >= k) & (mass >= mass_wanted)
    first = tl.min(tl.where(enough, j, NUM_THRESHOLDS - 1), 0)
    bits = tl.where(first < NUM_THRESHOLDS - 1, (127 - 3 * (first + 1)) << 23, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_chunks", "stride_plain"])
def choose_kernel(
    out_tokens_ptr,  # int [R]
    list_p_ptr,  # fp32 [R, V]
    list_id_ptr,  # int32 [R, V]
    scaled_ptr,  # fp32 [R, V]
    chunk_max_ptr,  # [R, chunks], as in sample_weights.py
    chunk_first_ptr,
    chunk_sum_ptr,
    chunk_counts_ptr,
    chunk_masses_ptr,
    seats_ptr,  # int [R]
    uniforms_ptr,  # float [R]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    V,
    num_chunks,
    stride_plain,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,  # chunks, padded
    BLOCK_L: tl.constexpr,  # tokens of the list in one iteration
):
    row = tl.program_id(0).to(tl.int64)
    seat = tl.maximum(tl.load(seats_ptr + row).to(tl.int64), 0) * stride_plain
    c = tl.arange(0, BLOCK_C)
    chunks = row * num_chunks + c
    maxima = tl.load(chunk_max_ptr + chunks, mask=c < num_chunks, other=float("-inf"))
    top = tl.max(maxima, 0)
    token_ptr = out_tokens_ptr + row
    firsts = tl.load(chunk_first_ptr + chunks, mask=c < num_chunks, other=NO_TOKEN)
    if (tl.min(firsts, 0) < 0) | (tl.abs(top) == float("inf")):
        tl.store(token_ptr, tl.full([], -1, out_tokens_ptr.dtype.element_ty))
        return
    if tl.load(temperature_ptr + seat) == 0.0:
        tl.store(token_ptr, tl.min(tl.where(maxima == top, firsts, NO_TOKEN), 0).to(out_tokens_ptr.dtype.element_ty))
        return

    k = tl.load(top_k_ptr + seat)
    top_p = tl.load(top_p_ptr + seat).to(tl.float64)
    min_p = tl.load(min_p_ptr + seat)
    uniform = tl.load(uniforms_ptr + row).to(tl.float64)
    sums = tl.load(chunk_sum_ptr + chunks, mask=c < num_chunks, other=0.0)
    scaled_ptr += row * V
    if (k <= 0) & (top_p >= 1.0) & (min_p <= 0.0):
        token = _draw_from_all(scaled_ptr, sums, c, top, uniform, V, CHUNK)
        tl.store(token_ptr, token.to(out_tokens_ptr.dtype.element_ty))
        return

    list_p_ptr += row * V
    list_id_ptr += row * V
    total = tl.sum(sums, 0)
    cut = min_p
    if min_p <= 0.0:
        # The masses were summed in fp32. With top_k the nucleus is one of its tokens: enough of them will do.
        mass_wanted = tl.where(k > 0, 0.0, (top_p + 1e-5) * total)
        first = row * num_chunks * NUM_THRESHOLDS
        cut = _sufficient_cut(chunk_counts_ptr + first, chunk_masses_ptr + first, num_chunks, k, mass_wanted, BLOCK_C)
    num_listed = _copy_candidates(
        list_p_ptr, list_id_ptr, scaled_ptr, chunk_max_ptr + row * num_chunks, num_chunks, top, cut, V, CHUNK
    )
    key = cut.to(tl.int32, bitcast=True)
    limit = tl.full([], NO_TOKEN, tl.int32)
    if (k > 0) | (min_p > 0.0):
        _, total = _reaching(list_p_ptr, num_listed, key, BLOCK_L)
    if (k > 0) & (num_listed > k):
        key, limit, total = _top_k(list_p_ptr, num_listed, key, k, BLOCK_L)
    if top_p < 1.0:
        key, limit = _top_p(list_p_ptr, num_listed, key, limit, top_p * total, BLOCK_L)
    token = _draw_from_list(list_p_ptr, list_id_ptr, num_listed, key, limit, uniform, BLOCK_L)
    tl.store(token_ptr, token.to(out_tokens_ptr.dtype.element_ty))
