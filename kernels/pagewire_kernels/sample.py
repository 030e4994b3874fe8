"""The choice of tokens from logits [R, V], exact and without a sort of the vocabulary.

The launches of sample_weights.py leave, for each chunk of the vocabulary, the largest logit, the sum of
p = exp(logit / temperature - row's largest) and how many tokens reach eight fixed thresholds with what mass.
choose_kernel then takes the first largest of a row, or draws from it.

What min_p, top_k and top_p leave is always "p above a threshold, and the first few that equal it". A fixed threshold
that certainly keeps enough is known from the sums; the tokens that reach it, commonly some hundreds, are copied in the
order of the vocabulary, and the exact threshold is found by bisection of the bits of p over this copy. Sums are fp64,
as the host's are.
"""

import torch
import triton
from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.sample_choice import choose_kernel
from pagewire_kernels.sample_weights import NUM_THRESHOLDS, change_kernel, weigh_kernel
from pagewire_kernels.sampling_tensors import SamplingTensors

CHUNK = 4096
LIST_BLOCK = 2048


def sample(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    uniforms: Tensor,
    num_chosen: Tensor,
    out_tokens: Tensor,
    bitmask: Tensor | None = None,
) -> None:
    """As ops.sample."""
    sample_in_chunks(logits, params, seats, uniforms, num_chosen, out_tokens, bitmask, CHUNK, LIST_BLOCK)


def sample_in_chunks(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    uniforms: Tensor,
    num_chosen: Tensor,
    out_tokens: Tensor,
    bitmask: Tensor | None,
    chunk: int,
    list_block: int,
) -> None:
    """As ops.sample, with the tokens of one program and of one iteration given. Scratch is sized by shapes alone."""
    _check_layout(logits, params, (seats, uniforms, num_chosen, out_tokens, *([] if bitmask is None else [bitmask])))
    num_rows, vocabulary = logits.shape
    if num_rows == 0:
        return
    num_chunks = triton.cdiv(vocabulary, chunk)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    scaled, list_p = scratch(torch.float32, vocabulary), scratch(torch.float32, vocabulary)
    list_id = scratch(torch.int32, vocabulary)
    chunk_max, chunk_first = scratch(torch.float32, num_chunks), scratch(torch.int32, num_chunks)
    chunk_sum = scratch(torch.float64, num_chunks)
    chunk_counts = scratch(torch.int32, num_chunks, NUM_THRESHOLDS.value)
    chunk_masses = scratch(torch.float32, num_chunks, NUM_THRESHOLDS.value)
    block_c = triton.next_power_of_2(num_chunks)
    stride = params.temperature.stride(0)
    change_kernel[(num_rows, num_chunks)](
        scaled,
        chunk_max,
        chunk_first,
        logits,
        seats if bitmask is None else bitmask,
        seats,
        num_chosen,
        params.temperature,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.min_tokens,
        params.banned_ids,
        params.bias_ids,
        params.bias_values,
        params.counts,
        vocabulary,
        logits.stride(0),
        stride,
        params.repetition_penalty.stride(0),
        params.banned_ids.stride(0),
        params.bias_ids.stride(0),
        params.counts.stride(0),
        MASKED=bitmask is not None,
        MAX_BANNED=params.banned_ids.shape[1],
        MAX_BIAS=params.bias_ids.shape[1],
        CHUNK=chunk,
        num_warps=8,
    )
    weigh_kernel[(num_rows, num_chunks)](
        chunk_sum,
        chunk_counts,
        chunk_masses,
        scaled,
        chunk_max,
        seats,
        params.temperature,
        params.top_k,
        params.top_p,
        vocabulary,
        stride,
        CHUNK=chunk,
        BLOCK_C=block_c,
        num_warps=8,
    )
    choose_kernel[(num_rows,)](
        out_tokens,
        list_p,
        list_id,
        scaled,
        chunk_max,
        chunk_first,
        chunk_sum,
        chunk_counts,
        chunk_masses,
        seats,
        uniforms,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        vocabulary,
        num_chunks,
        stride,
        CHUNK=chunk,
        BLOCK_C=block_c,
        BLOCK_L=list_block,
        num_warps=8,
    )


def _check_layout(logits: Tensor, params: SamplingTensors, rows: tuple[Tensor, ...]) -> None:
    """Rows contiguous; seats of the same stride where kernels read them with one, which may be 0."""
    check(logits.stride(1) == 1, f"rows of logits must be contiguous, got strides {logits.stride()}")
    check(all(tensor.is_contiguous() for tensor in rows), "seats, uniforms, ... and bitmask must be contiguous")
    plain = (params.temperature, params.top_k, params.top_p, params.min_p)
    change = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty, params.min_tokens)
    for tensors in (plain, change, (params.bias_ids, params.bias_values)):
        check(len({tensor.stride(0) for tensor in tensors}) == 1, "sampling parameters have strides of their own")
    check(
        params.bias_ids.stride(1) == params.bias_values.stride(1) == params.banned_ids.stride(1) == 1,
        "lists of token ids must be contiguous",
    )
