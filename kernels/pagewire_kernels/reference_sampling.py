"""Plain torch for the choice of tokens from logits, all rows at once and without reading anything back.

Order of operations: grammar, bans, bias, repetition, frequency and presence penalties; then temperature, min_p, top_k,
top_p; then the inverse of the cumulative distribution in vocabulary order at the row's uniform. Ties of probability
rank by token id.
"""

import torch
from torch import Tensor

from pagewire_kernels.sampling_tensors import IN_PROMPT, SamplingTensors


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
    rows = seats.long().clamp(min=0)
    changed = change_logits(logits.float(), params, rows, num_chosen, bitmask)
    temperature = params.temperature[rows]
    drawn = _draw(changed, params, rows, uniforms, torch.where(temperature > 0, temperature, 1.0))
    tokens = torch.where(temperature > 0, drawn, _first_of_largest(changed))
    nothing = logits.isnan().any(-1) | ~changed.amax(-1).isfinite()
    out_tokens.copy_(torch.where(nothing, -1, tokens))


def count_tokens(counts: Tensor, seats: Tensor, tokens: Tensor) -> None:
    """As ops.count_tokens."""
    real = (seats >= 0).to(counts.dtype)
    counts.index_put_((seats.long().clamp(min=0), tokens.long().clamp(min=0)), real, accumulate=True)


def change_logits(
    logits: Tensor, params: SamplingTensors, rows: Tensor, num_chosen: Tensor, bitmask: Tensor | None
) -> Tensor:
    """float32 [R, V] after all but temperature and truncation; rows int64 [R] are seats."""
    if bitmask is not None:
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bitmask[:, :, None] >> shifts & 1).bool().flatten(1)[:, : logits.shape[1]]
        logits = logits.masked_fill(~allowed, -torch.inf)
    banned = torch.where((num_chosen < params.min_tokens[rows])[:, None], params.banned_ids[rows], -1)
    logits = _scatter_add(logits, banned, torch.full_like(banned, -torch.inf, dtype=torch.float32))
    logits = _scatter_add(logits, params.bias_ids[rows], params.bias_values[rows])
    counts = params.counts[rows]
    repetition = params.repetition_penalty[rows][:, None]
    logits = torch.where(counts > 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    times = counts & (IN_PROMPT - 1)
    frequency, presence = params.frequency_penalty[rows][:, None], params.presence_penalty[rows][:, None]
    return torch.where(times > 0, logits - (frequency * times + presence), logits)


def _scatter_add(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds each row's values at its ids; -1 is nowhere: a spare column."""
    num_rows, vocabulary = logits.shape
    wide = torch.cat((logits, logits.new_zeros(num_rows, 1)), dim=1)
    columns = torch.where(ids >= 0, ids, vocabulary).long()
    return wide.scatter_add(1, columns, values)[:, :vocabulary]


def _draw(changed: Tensor, params: SamplingTensors, rows: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
    """A random token per row, int64 [R]."""
    probs = torch.softmax(changed / temperature[:, None], -1)
    probs = probs.masked_fill(probs < params.min_p[rows][:, None] * probs.amax(-1, keepdim=True), 0.0)
    cumulative = _truncate(probs, params, rows).double().cumsum(-1)
    targets = uniforms[:, None].double() * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # The product may round up to the total itself: then the last possible token is meant.
    return torch.minimum(drawn, _first_of_largest(cumulative))


def _truncate(probs: Tensor, params: SamplingTensors, rows: Tensor) -> Tensor:
    """Zeroes what top_k and then top_p leave out (top_p of the distribution that top_k left)."""
    vocabulary = probs.shape[-1]
    top_k = params.top_k[rows]
    top_k = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    kept = torch.arange(vocabulary, device=probs.device) < top_k
    mass = (ordered * kept).double()
    before = mass.cumsum(-1) - mass  # probability of the tokens ranked above
    top_p = params.top_p[rows][:, None]
    kept &= (before < top_p * mass.sum(-1, keepdim=True)) | (top_p >= 1)
    kept[:, 0] = True
    return probs.masked_fill(~torch.zeros_like(kept).scatter(-1, ids, kept), 0.0)


def _first_of_largest(values: Tensor) -> Tensor:
    """argmax whose ties go to the lowest index on every device."""
    index = torch.arange(values.shape[-1], device=values.device)
    largest = values.amax(-1, keepdim=True)
    return torch.where(values == largest, index, values.shape[-1]).amin(-1)
