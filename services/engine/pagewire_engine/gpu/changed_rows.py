"""The rows whose logits are changed before they are sampled: grammars' masks, bans, bias and penalties.

Few rows of few batches, so nothing is kept for them between steps: what they need is uploaded, their tokens are counted
on the device, and they are sampled a second time, over what the step chose for them. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pagewire_kernels import ops
from torch import Tensor

from pagewire_engine.gpu.transfers import Arrays, upload
from pagewire_engine.sampler import SampleRow, sample

_PLAIN = ("temperature", "top_k", "top_p", "min_p", "uniforms")


def sample_changed(
    rows: Sequence[SampleRow],
    num_tokens: np.ndarray,
    plain: Arrays,
    logits: Tensor,
    tokens: Tensor,
    allowed: np.ndarray | None = None,
) -> None:
    """Chooses anew, in `tokens` int64 [R], for the rows that change their logits [R, V].

    num_tokens [R]: the tokens before each row's; plain: SamplingRows' arrays of all rows; allowed: see Batch.
    """
    masked = np.zeros(len(rows), bool) if allowed is None else (allowed != 0xFFFFFFFF).any(1)
    sample_others(rows, num_tokens, logits, tokens, allowed)
    changed = [r for r, row in enumerate(rows) if masked[r] or row.params.changes_logits]
    changed = [r for r in changed if not rows[r].params.needs_sampler]
    if not changed:
        return
    chosen_rows = [rows[r] for r in changed]
    prompts = np.array([row.num_prompt for row in chosen_rows], np.int32)
    arrays = {name: plain[name][changed] for name in _PLAIN} | _lists(chosen_rows) | _counted(chosen_rows)
    arrays |= {"rows": np.array(changed, np.int64), "num_chosen": num_tokens[changed].astype(np.int32) - prompts}
    if allowed is not None:
        arrays["bitmask"] = allowed[changed].view(np.int32)
    on_device = upload(arrays, logits.device)
    again = torch.empty(len(changed), dtype=torch.int64, device=logits.device)
    seats = torch.arange(len(changed), dtype=torch.int32, device=logits.device)
    fields = {name: on_device[name] for name in ops.SamplingTensors.__slots__ if name != "counts"}
    penalised = any(row.params.has_penalty for row in chosen_rows)
    counts = _counts(on_device, len(changed) if penalised else 1, logits.shape[1])
    params = ops.SamplingTensors(**fields, counts=counts.expand(len(changed), -1))
    ops.sample(logits.index_select(0, on_device["rows"]), params, seats, on_device["uniforms"],
               on_device["num_chosen"], again, on_device.get("bitmask"))  # fmt: skip
    tokens.index_copy_(0, on_device["rows"], again)


def sample_others(
    rows: Sequence[SampleRow], num_tokens: np.ndarray, logits: Tensor, tokens: Tensor, allowed: np.ndarray | None = None
) -> None:
    """The same for rows that only the plain sampler knows: watermarks, typical_p. It waits for the device."""
    others = [r for r, row in enumerate(rows) if row.params.needs_sampler]
    if others:
        masks = None if allowed is None else allowed[others]
        chosen = sample(logits[others].float(), [rows[r] for r in others], num_tokens[others].tolist(), masks)
        tokens[others] = torch.tensor([one.token for one in chosen], device=tokens.device)


def _lists(rows: Sequence[SampleRow]) -> Arrays:
    """Penalties [C] and lists of token ids [C, ...], padded with -1 to a power of two: kernels know their length."""
    params = [row.params for row in rows]
    return {
        "repetition_penalty": np.array([p.repetition_penalty for p in params], np.float32),
        "presence_penalty": np.array([p.presence_penalty for p in params], np.float32),
        "frequency_penalty": np.array([p.frequency_penalty for p in params], np.float32),
        "min_tokens": np.array([p.min_tokens for p in params], np.int32),
        "banned_ids": _padded([sorted(p.banned_before_min_tokens) for p in params], -1, np.int32),
        "bias_ids": _padded([list(p.logit_bias) for p in params], -1, np.int32),
        "bias_values": _padded([list(p.logit_bias.values()) for p in params], 0, np.float32),
    }


def _padded(lists: Sequence[Sequence[float]], filling: int, dtype: type[np.number]) -> np.ndarray:
    longest = max(map(len, lists))
    padded = np.full((len(lists), 1 << max(longest - 1, 0).bit_length()), filling, dtype)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    return padded


def _counted(rows: Sequence[SampleRow]) -> Arrays:
    """The tokens that penalties are about, and whose they are: of the prompt, and chosen."""
    penalised = [(i, row.repeated, row.params) for i, row in enumerate(rows) if row.params.has_penalty]
    prompt = [(i, seen_only if p.repetition_penalty != 1.0 else ()) for i, (seen_only, _), p in penalised]
    chosen = [(i, counted) for i, (_, counted), _ in penalised]
    return _flat("prompt", prompt, np.int64) | _flat("chosen", chosen, np.int32)


def _flat(name: str, lists: Sequence[tuple[int, Sequence[int]]], dtype: type[np.number]) -> Arrays:
    ids = [token for _, tokens in lists for token in tokens]
    owners = np.repeat([i for i, _ in lists], [len(tokens) for _, tokens in lists])
    return {f"{name}_ids": np.array(ids, dtype), f"{name}_rows": owners.astype(dtype)}


def _counts(on_device: dict[str, Tensor], num_rows: int, vocabulary: int) -> Tensor:
    """int32 [num_rows, V]: times chosen, and whether the token is in the prompt."""
    counts = torch.zeros(num_rows, vocabulary, dtype=torch.int32, device=on_device["rows"].device)
    in_prompt = torch.full_like(on_device["prompt_ids"], ops.IN_PROMPT, dtype=torch.int32)
    counts.index_put_((on_device["prompt_rows"], on_device["prompt_ids"]), in_prompt)
    ops.count_tokens(counts, on_device["chosen_rows"], on_device["chosen_ids"])
    return counts
