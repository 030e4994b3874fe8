"""Log probabilities of a prompt's own tokens: the rows of a step that give them, and what came of those rows.

The logits of a row are those of the token after it. They are made for some rows at a time and reduced at once, so that
there are never more of them than LOGITS_BYTES, however long the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

LOGITS_BYTES = 32 << 20  # float32, of a piece
CACHED_BYTES = 1 << 20  # of it, what a CPU reduces at once: four times as fast as all of it

_NAMES = "score_logprobs", "score_ranks", "score_top_ids", "score_top"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """S tokens. Ranks begin at 1: how many tokens of the vocabulary are at least as likely."""

    logprobs: np.ndarray  # float32 [S]
    ranks: np.ndarray  # int32 [S]
    top_ids: np.ndarray  # int32 [S, K], best first
    top_logprobs: np.ndarray  # float32 [S, K]

    @classmethod
    def of(cls, result: Mapping[str, torch.Tensor]) -> Scores:
        """From what `score_rows` gave, on any device."""
        return cls(*(result[name].cpu().numpy() for name in _NAMES))

    @property
    def are_numbers(self) -> bool:
        return not np.isnan(self.logprobs).any()

    def part(self, begin: int, end: int, num_top: int) -> Scores:
        """Of some of the tokens, and fewer of the best."""
        few = slice(begin, end), slice(num_top)
        return Scores(self.logprobs[begin:end], self.ranks[begin:end], self.top_ids[few], self.top_logprobs[few])


def score_rows(
    rows: torch.Tensor, ids: torch.Tensor, num_top: int, vocab_size: int, logits: Callable[[torch.Tensor], torch.Tensor]
) -> Tensors:
    """Scores of the token `ids` [S] after each of `rows` [S, E]. logits: some rows -> float32 [rows, vocabulary]."""
    at_once, shape = max(LOGITS_BYTES // (4 * vocab_size), 1), (len(ids), min(num_top, vocab_size))
    # There before the first piece: what is kept of one would lie where the next one's logits could have been (measured:
    # 1.6 GB more memory for 1500 tokens of a vocabulary of 152 000).
    found = {
        "score_logprobs": rows.new_empty(shape[0], dtype=torch.float32),
        "score_ranks": rows.new_empty(shape[0], dtype=torch.int32),
        "score_top_ids": rows.new_empty(shape, dtype=torch.int32),
        "score_top": rows.new_empty(shape, dtype=torch.float32),
    }
    for begin in range(0, len(ids), at_once):
        made = logits(rows[begin : begin + at_once])
        few = max(CACHED_BYTES // (4 * vocab_size), 1) if rows.device.type == "cpu" else at_once
        for i in range(0, len(made), few):
            some = slice(begin + i, begin + min(i + few, len(made)))
            _score(made[i : i + few], ids[some].long(), {name: tensor[some] for name, tensor in found.items()})
    return found


def _score(logits: torch.Tensor, ids: torch.Tensor, found: Tensors) -> None:
    """Fills in what is found of some rows."""
    raw = torch.log_softmax(logits, -1)
    own = raw.gather(-1, ids[:, None])
    found["score_logprobs"].copy_(own[:, 0])
    found["score_ranks"].copy_((raw >= own).sum(-1))
    values, top_ids = raw.topk(found["score_top"].shape[1])
    found["score_top"].copy_(values)
    found["score_top_ids"].copy_(top_ids)
