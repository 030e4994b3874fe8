"""A watermark in the choice of tokens: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2.

The token before seeds a generator, which divides the vocabulary; a green token is made likelier by `DELTA`. Of a text
without the watermark a share of GAMMA is green, of one with it far more. As in TGI, the green ones are the first of a
permutation that KEY times the token before seeds; here always torch's on a CPU, so that one detector finds all texts.
"""

from __future__ import annotations

import functools

import torch

GAMMA, DELTA, KEY = 0.5, 2.0, 15485863


@functools.lru_cache(maxsize=64)  # making one takes 2 ms for 150 000 tokens; choices and drafts may want it again
def green_tokens(before: int, vocab_size: int) -> torch.Tensor:
    """int64, on the CPU."""
    generator = torch.Generator().manual_seed(KEY * before)
    return torch.randperm(vocab_size, generator=generator)[: int(GAMMA * vocab_size)]


def add_watermark(logits: torch.Tensor, before: int) -> None:
    """Changes one row's logits [V] in place."""
    logits[green_tokens(before, len(logits)).to(logits.device)] += DELTA
