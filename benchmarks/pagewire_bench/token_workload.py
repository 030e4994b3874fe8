"""Prompts of token ids, for servers that all run one model: their lengths are exact."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pagewire_cli.load.workload import Request

_FIRST_ID = 64


@dataclass(frozen=True)
class TokenWorkload:
    """Prompts of random token ids, each exactly `prompt_len` long; request i is a function of (seed, i).

    Ids are below `num_tokens`, which every server's tokenizer must have, and above the special ones.
    """

    num_tokens: int
    prompt_len: int
    output_len: int
    shared_prefix_share: float
    seed: str

    def request(self, index: int) -> Request:
        num_shared = round(self.prompt_len * self.shared_prefix_share)
        shared, own = random.Random(f"{self.seed}/shared"), random.Random(f"{self.seed}/{index}")
        ids = [shared.randrange(_FIRST_ID, self.num_tokens) for _ in range(num_shared)]
        ids += [own.randrange(_FIRST_ID, self.num_tokens) for _ in range(self.prompt_len - num_shared)]
        return Request(index, ids, self.output_len)
