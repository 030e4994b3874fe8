"""Sampling parameters as tensors on the device, one row per seat, so that a step uploads only what changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Set in SamplingTensors.counts beside the number of times a token was chosen: the token is in the prompt.
IN_PROMPT = 1 << 30


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """What the choice of a token depends on, for S seats and V tokens of the vocabulary.

    Lists of token ids are padded with -1. min_tokens bans `banned_ids` while fewer tokens than it were chosen.
    """

    temperature: Tensor  # float32 [S], 0: greedy
    top_k: Tensor  # int32 [S], 0: all
    top_p: Tensor  # float64 [S]
    min_p: Tensor  # float32 [S]
    repetition_penalty: Tensor  # float32 [S], 1: none
    presence_penalty: Tensor  # float32 [S]
    frequency_penalty: Tensor  # float32 [S]
    min_tokens: Tensor  # int32 [S]
    banned_ids: Tensor  # int32 [S, max_banned]
    bias_ids: Tensor  # int32 [S, max_bias], each id once
    bias_values: Tensor  # float32 [S, max_bias]
    counts: Tensor  # int32 [S, V]: times chosen, plus IN_PROMPT; read only where a penalty is set

    @classmethod
    def neutral(
        cls, num_seats: int, vocabulary: int, device: torch.device | str, max_banned: int = 16, max_bias: int = 320
    ) -> SamplingTensors:
        """Every seat greedy and unchanged. OpenAI allows 300 biased tokens."""

        def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_seats, *shape), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0.0),
            top_k=full(0, dtype=torch.int32),
            top_p=full(1.0, dtype=torch.float64),
            min_p=full(0.0),
            repetition_penalty=full(1.0),
            presence_penalty=full(0.0),
            frequency_penalty=full(0.0),
            min_tokens=full(0, dtype=torch.int32),
            banned_ids=full(-1, max_banned, dtype=torch.int32),
            bias_ids=full(-1, max_bias, dtype=torch.int32),
            bias_values=full(0.0, max_bias),
            counts=full(0, vocabulary, dtype=torch.int32),
        )
