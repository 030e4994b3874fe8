"""The choice of tokens on the device. Re-exported by ops.py. R rows, V tokens of the vocabulary, S seats."""

from torch import Tensor

from pagewire_kernels.dispatch import implementation
from pagewire_kernels.sampling_tensors import SamplingTensors
from pagewire_kernels.step_checks import check_sample


def sample(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    uniforms: Tensor,
    num_chosen: Tensor,
    out_tokens: Tensor,
    bitmask: Tensor | None = None,
) -> None:
    """One token for each row into out_tokens int [R]; nothing waits for the device.

    logits [R, V], not changed; seats int [R], the row of `params` of each (negative: padding, its token means nothing);
    uniforms float [R] in [0, 1) (float64 keeps 53 bits); num_chosen int [R], tokens that the sequence has
    generated so far, for min_tokens; bitmask int32 [R, ceil(V / 32)], bit i % 32 of word i // 32 allows token i.

    The order of operations is grammar, bans, bias, penalties; then, where the temperature is not 0, temperature, min_p,
    top_k, top_p, and the first token whose cumulative probability, in vocabulary order, exceeds uniform * total.
    Ties rank by token id. A row with a logit that is not a number has no token: -1. Nor has one whose largest logit
    is infinite in the end, as where every token is excluded. Nothing is approximated: only rounding can differ between
    devices.
    """
    check_sample(logits, params, seats, uniforms, num_chosen, out_tokens, bitmask)
    implementation(logits.device.type).sample(logits, params, seats, uniforms, num_chosen, out_tokens, bitmask)


def count_tokens(counts: Tensor, seats: Tensor, tokens: Tensor) -> None:
    """counts[seats[r], tokens[r]] += 1 for each row; a negative seat is padding. counts int32 [S, V]."""
    implementation(counts.device.type).count_tokens(counts, seats, tokens)
