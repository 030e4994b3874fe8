"""The first two launches of the choice of tokens (sample.py): logits to probabilities and their sums, chunk by chunk.

Every program has one chunk of the vocabulary of one row, so that a single row already fills a part of the GPU.
"""

import triton
import triton.language as tl

from pagewire_kernels.sampling_tensors import IN_PROMPT as _IN_PROMPT

IN_PROMPT = tl.constexpr(_IN_PROMPT)
NO_TOKEN = tl.constexpr(2**31 - 1)
NUM_THRESHOLDS = tl.constexpr(8)  # of p: 2**-3, 2**-6, ..., 2**-21, 0


@triton.jit
def relative_probabilities(scaled, top):
    """exp(scaled - top), at most 1: the approximation of a value next to 0 may round up past it."""
    return tl.minimum(tl.exp(scaled - top), 1.0)


@triton.jit
def _banned(logits, ids, list_ptr, MAX_BANNED: tl.constexpr):
    for j in range(MAX_BANNED):
        logits = tl.where(ids == tl.load(list_ptr + j), float("-inf"), logits)
    return logits


@triton.jit
def _biased(logits, ids, ids_ptr, values_ptr, MAX_BIAS: tl.constexpr):
    """The list ends at its first -1."""
    j = 0
    biased = tl.load(ids_ptr)
    while biased >= 0:
        logits += tl.where(ids == biased, tl.load(values_ptr + j), 0.0)
        j += 1
        biased = tl.load(ids_ptr + j, mask=j < MAX_BIAS, other=-1)
    return logits


@triton.jit
def _penalised(logits, counts, repetition, presence, frequency):
    divided = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    logits = tl.where(counts > 0, divided, logits)
    times = (counts & (IN_PROMPT - 1)).to(tl.float32)
    return tl.where(times > 0, logits - (frequency * times + presence), logits)


@triton.jit(do_not_specialize=["stride_plain", "stride_change", "stride_banned", "stride_bias", "stride_counts"])
def change_kernel(
    scaled_ptr,  # fp32 [R, V], written where the temperature is not 0
    chunk_max_ptr,  # fp32 [R, chunks], of scaled or, where the temperature is 0, of the changed logits
    chunk_first_ptr,  # int32 [R, chunks], the first token that has it; -1 where a logit is not a number
    logits_ptr,  # [R, V]
    bitmask_ptr,  # int32 [R, ceil(V / 32)], read if MASKED
    seats_ptr,  # int [R]
    num_chosen_ptr,  # int [R]
    temperature_ptr,  # this and what follows: SamplingTensors
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    min_tokens_ptr,
    banned_ids_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    counts_ptr,
    V,
    stride_logits,
    stride_plain,
    stride_change,
    stride_banned,
    stride_bias,
    stride_counts,
    MASKED: tl.constexpr,
    MAX_BANNED: tl.constexpr,
    MAX_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < V
    logits = tl.load(logits_ptr + row * stride_logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    broken = tl.max((logits != logits).to(tl.int32), 0)
    logits = tl.where(logits != logits, 0.0, logits)
    seat = tl.maximum(tl.load(seats_ptr + row).to(tl.int64), 0)
    if MASKED:
        words = tl.load(bitmask_ptr + row * tl.cdiv(V, 32) + ids // 32, mask=inside, other=0)
        logits = tl.where(((words >> (ids % 32)) & 1) != 0, logits, float("-inf"))
    if tl.load(num_chosen_ptr + row) < tl.load(min_tokens_ptr + seat * stride_change):
        logits = _banned(logits, ids, banned_ids_ptr + seat * stride_banned, MAX_BANNED)
    logits = _biased(logits, ids, bias_ids_ptr + seat * stride_bias, bias_values_ptr + seat * stride_bias, MAX_BIAS)
    repetition = tl.load(repetition_ptr + seat * stride_change)
    presence = tl.load(presence_ptr + seat * stride_change)
    frequency = tl.load(frequency_ptr + seat * stride_change)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        counts = tl.load(counts_ptr + seat * stride_counts + ids, mask=inside, other=0)
        logits = _penalised(logits, counts, repetition, presence, frequency)

    largest = tl.max(logits, 0)
    first = tl.min(tl.where((logits == largest) & inside, ids, NO_TOKEN), 0)
    temperature = tl.load(temperature_ptr + seat * stride_plain)
    if temperature > 0.0:
        # Rounded to nearest, so that the largest stays the largest.
        tl.store(scaled_ptr + row * V + ids, tl.div_rn(logits, temperature), mask=inside)
        largest = tl.div_rn(largest, temperature)
    at = row * tl.num_programs(1) + chunk
    tl.store(chunk_max_ptr + at, largest)
    tl.store(chunk_first_ptr + at, tl.where(broken != 0, -1, first))


@triton.jit(do_not_specialize=["stride_plain"])
def weigh_kernel(
    chunk_sum_ptr,  # fp64 [R, chunks], of p = exp(scaled - largest of the row)
    chunk_counts_ptr,  # int32 [R, chunks, NUM_THRESHOLDS], tokens whose p reaches the threshold
    chunk_masses_ptr,  # fp32 [R, chunks, NUM_THRESHOLDS], their p
    scaled_ptr,  # fp32 [R, V]
    chunk_max_ptr,  # fp32 [R, chunks]
    seats_ptr,  # int [R]
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    V,
    stride_plain,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,  # chunks, padded
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    seat = tl.maximum(tl.load(seats_ptr + row).to(tl.int64), 0)
    if tl.load(temperature_ptr + seat * stride_plain) == 0.0:
        return
    c = tl.arange(0, BLOCK_C)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < V
    top = tl.max(tl.load(chunk_max_ptr + row * num_chunks + c, mask=c < num_chunks, other=float("-inf")), 0)
    if tl.abs(top) == float("inf"):  # there is nothing to draw
        return
    p = relative_probabilities(tl.load(scaled_ptr + row * V + ids, mask=inside, other=float("-inf")), top)
    at = row * num_chunks + chunk
    tl.store(chunk_sum_ptr + at, tl.sum(p.to(tl.float64), 0))
    if (tl.load(top_k_ptr + seat * stride_plain) > 0) | (tl.load(top_p_ptr + seat * stride_plain) < 1.0):
        threshold = 1.0
        for j in tl.static_range(NUM_THRESHOLDS):
            threshold = threshold * 0.125 if j + 1 < NUM_THRESHOLDS else 0.0
            reached = (p >= threshold) & inside
            tl.store(chunk_counts_ptr + at * NUM_THRESHOLDS + j, tl.sum(reached.to(tl.int32), 0))
            tl.store(chunk_masses_ptr + at * NUM_THRESHOLDS + j, tl.sum(tl.where(reached, p, 0.0), 0))
