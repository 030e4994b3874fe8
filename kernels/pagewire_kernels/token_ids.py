"""Token ids that stay on the device: fed to the next step, and counted for penalties."""

import triton
import triton.language as tl
from torch import Tensor

from pagewire_kernels.checks import check

_BLOCK = 256


@triton.jit(do_not_specialize=["num_tokens"])
def resolve_input_ids_kernel(
    input_ids_ptr,  # int [T]
    previous_tokens_ptr,  # int [R]
    num_tokens,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(input_ids_ptr + t, mask=t < num_tokens, other=0)
    pending = ids < 0
    tokens = tl.load(previous_tokens_ptr - 1 - ids, mask=pending, other=0)
    tl.store(input_ids_ptr + t, tl.maximum(tokens, 0).to(ids.dtype), mask=pending)


@triton.jit(do_not_specialize=["num_rows", "stride_seat"])
def count_tokens_kernel(
    counts_ptr,  # int32 [S, V]
    seats_ptr,  # int [R]
    tokens_ptr,  # int [R]
    num_rows,
    stride_seat,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seats = tl.load(seats_ptr + r, mask=r < num_rows, other=-1).to(tl.int64)
    tokens = tl.load(tokens_ptr + r, mask=r < num_rows, other=0)
    tl.atomic_add(counts_ptr + seats * stride_seat + tokens, 1, mask=seats >= 0, sem="relaxed")


def resolve_input_ids(input_ids: Tensor, previous_tokens: Tensor) -> None:
    """As ops.resolve_input_ids."""
    check(input_ids.is_contiguous() and previous_tokens.is_contiguous(), "ids must be contiguous")
    num_tokens = input_ids.shape[0]
    if num_tokens:
        resolve_input_ids_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            input_ids, previous_tokens, num_tokens, BLOCK=_BLOCK, num_warps=4
        )


def count_tokens(counts: Tensor, seats: Tensor, tokens: Tensor) -> None:
    """As ops.count_tokens."""
    check(counts.stride(1) == 1 and seats.is_contiguous() and tokens.is_contiguous(), "rows must be contiguous")
    num_rows = seats.shape[0]
    if num_rows:
        count_tokens_kernel[(triton.cdiv(num_rows, _BLOCK),)](
            counts, seats, tokens, num_rows, counts.stride(0), BLOCK=_BLOCK, num_warps=4
        )
