"""What an engine is told at start; read once, never changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Blocks hold `block_size` tokens."""

    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    max_prefill_delay_ms: float = 0.0  # that prompts may add to a decode step; 0: no limit
    enough_prompt_tokens: int = 1 << 30  # of a step: more are no quicker each, and all first tokens wait for the last
    vocab_size: int = 1 << 32  # token ids are below it
    attention_work: float = 0.0  # of attending to one token, as a share of a token's other work

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)
