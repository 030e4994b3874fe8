"""Logits -> tokens.

Randomness is counter-based: the uniform that chooses the token at a position is a function of
(seed, choice, position) alone, so it does not matter which worker samples, in which batch, or whether
it is the first time. The token is found by inverting the cumulative distribution in vocabulary order.

Order of operations, as in vLLM: log probabilities are of the raw logits; then the watermark, min_tokens bans (where
there is a mask they are in it), logit bias, repetition, frequency and presence penalties; then temperature, min_p,
top_k, top_p, typical_p.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagewire_engine.constraint import Matching
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.watermark import add_watermark

NO_TOKEN = -1
NOT_NUMBERS = "the model's logits are not numbers"
OR_EXCLUDED = ", or the request excludes every token"


@dataclass(frozen=True)
class SampleRow:
    """One token to choose: the tokens so far, the first `num_prompt` of which are the prompt.

    matching: of the grammar that the output follows, if it follows one. What may come is in Batch.allowed.
    """

    params: SamplingParams
    choice: int
    tokens: Sequence[int]
    num_prompt: int
    matching: Matching | None = None

    @property
    def repeated(self) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens that penalties are about: some for the repetition penalty alone, the others for all three."""
        if window := self.params.penalty_window:
            return (), self.tokens[-window:]
        return self.tokens[: self.num_prompt], self.tokens[self.num_prompt :]


@dataclass(frozen=True)
class Sampled:
    """A chosen token; logprobs only if the request asked: of the token, and of the best (id, logprob).

    token is NO_TOKEN where none follows from the logits: one is not a number, or the largest that is left is infinite.
    hidden: float32 [E] in its place, with NO_TOKEN, where the request embeds.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    hidden: torch.Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether nothing follows from what the model computed."""
        return self.token < 0 and (self.hidden is None or bool(self.hidden.isnan().any()))


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that only these three decide (BLAKE2b, 53 bits)."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(
    logits: torch.Tensor,
    rows: Sequence[SampleRow],
    num_tokens: Sequence[int] | None = None,
    allowed: np.ndarray | None = None,
) -> list[Sampled]:
    """One token per row. logits: float32 [rows, vocabulary]; overwritten. allowed: see Batch.

    num_tokens: how many tokens precede each row's, if `SampleRow.tokens` lacks one that is not known yet.
    """
    broken = torch.isnan(logits).any(-1).nonzero()[:, 0].tolist()
    logits[broken] = 0.0
    num_tokens = [len(row.tokens) for row in rows] if num_tokens is None else num_tokens
    raw = torch.log_softmax(logits, -1) if any(r.params.logprobs is not None for r in rows) else None
    for i, row in enumerate(rows):
        if row.params.changes_logits:
            _change(logits[i], row)
    if allowed is not None:
        bits = np.unpackbits(allowed.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        logits.masked_fill_(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)
    largest = logits.max(-1)
    broken += (~largest.values.isfinite()).nonzero()[:, 0].tolist()
    tokens = largest.indices.tolist()
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if random:
        drawn = _draw(logits[random], [rows[i] for i in random], [num_tokens[i] for i in random])
        for i, token in zip(random, drawn, strict=True):
            tokens[i] = token
    for i in broken:
        tokens[i] = NO_TOKEN
    return [
        Sampled(token) if raw is None else _with_logprobs(token, raw[i], row.params)
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def _with_logprobs(token: int, raw: torch.Tensor, params: SamplingParams) -> Sampled:
    if params.logprobs is None or token == NO_TOKEN:
        return Sampled(token)
    ids = list(params.logprob_token_ids) or raw.topk(min(params.logprobs, raw.numel())).indices.tolist()
    return Sampled(token, raw[token].item(), best_first(zip(ids, raw[ids].tolist(), strict=True)))


def best_first(told: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Token ids and their log probabilities; equals keep their order."""
    return tuple(sorted(told, key=lambda one: -one[1]))


def _change(logits: torch.Tensor, row: SampleRow) -> None:
    """Bans, bias and penalties of one row, in place."""
    p = row.params
    if p.watermark:
        add_watermark(logits, row.tokens[-1])
    if len(row.tokens) - row.num_prompt < p.min_tokens and p.banned_before_min_tokens:
        logits[list(p.banned_before_min_tokens)] = -torch.inf
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(p.logit_bias.values()), device=logits.device)
    if p.has_penalty:
        _penalise(logits, row)


def _penalise(logits: torch.Tensor, row: SampleRow) -> None:
    p = row.params
    seen_only, counted = row.repeated
    if p.repetition_penalty != 1.0:
        seen = torch.tensor([*seen_only, *counted], device=logits.device).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.frequency_penalty or p.presence_penalty) and counted:
        ids, counts = torch.tensor(counted, device=logits.device).unique(return_counts=True)
        logits[ids] -= p.frequency_penalty * counts + p.presence_penalty


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow], num_tokens: Sequence[int]) -> list[int]:
    """A random token per row from the tempered, truncated distribution."""
    device = logits.device
    temperature = torch.tensor([r.params.temperature for r in rows], device=device)
    probs = torch.softmax(logits / temperature[:, None], -1)
    if any(r.params.min_p > 0 for r in rows):
        min_p = torch.tensor([r.params.min_p for r in rows], device=device)
        probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0.0)
    if any(r.params.top_k or r.params.top_p < 1 for r in rows):
        probs = _truncate(probs, rows)
    if any(r.params.typical_p < 1 for r in rows):
        probs = _typical(probs, rows)
    cumulative = probs.double().cumsum(-1)
    uniforms = [uniform(r.params.seed, r.choice, n) for r, n in zip(rows, num_tokens, strict=True)]
    targets = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # The product may round up to the total itself: then the last possible token is meant.
    last = (probs > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last).tolist()


def _truncate(probs: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Zeroes what top_k and then top_p leave out (top_p of the distribution that top_k left)."""
    device, vocabulary = probs.device, probs.shape[-1]
    top_k = torch.tensor([r.params.top_k or vocabulary for r in rows], device=device).clamp(max=vocabulary)
    top_p = torch.tensor([r.params.top_p for r in rows], dtype=torch.float64, device=device)
    ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    kept = torch.arange(vocabulary, device=device) < top_k[:, None]
    mass = (ordered * kept).double()
    before = mass.cumsum(-1) - mass  # probability of the tokens ranked above
    kept &= before < top_p[:, None] * mass.sum(-1, keepdim=True)
    kept[:, 0] = True
    return probs.masked_fill(~torch.zeros_like(kept).scatter(-1, ids, kept), 0.0)


def _typical(probs: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Zeroes all but the most typical tokens, as many as make up typical_p.

    Meister et al. 2023, "Locally Typical Sampling" (arXiv 2202.00666): typical is a token whose surprise is near the
    distribution's entropy.
    """
    typical_p = torch.tensor([r.params.typical_p for r in rows], dtype=torch.float64, device=probs.device)
    p = probs.double() / probs.double().sum(-1, keepdim=True)
    surprise = -p.log()
    entropy = torch.where(p > 0, p * surprise, 0.0).sum(-1, keepdim=True)
    ids = torch.sort((surprise - entropy).abs(), dim=-1, stable=True).indices
    mass = p.gather(-1, ids)
    kept = mass.cumsum(-1) - mass < typical_p[:, None]
    kept |= (typical_p >= 1)[:, None]
    return probs.masked_fill(~torch.zeros_like(kept).scatter(-1, ids, kept), 0.0)
