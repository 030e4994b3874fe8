"""The tokens of a launched step: chosen on the device, read when the engine asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagewire_engine.gpu.transfers import upload
from pagewire_engine.sampler import NO_TOKEN, Sampled, SampleRow, best_first
from pagewire_engine.scoring import Scores


@dataclass(frozen=True)
class Logprobs:
    """Of the tokens of some rows."""

    rows: Sequence[int]  # [L], of the step's sampled rows
    counts: Sequence[int]  # [L], how many of K each asked for
    chosen: Tensor  # [L], of the token itself
    ids: Tensor  # [L, K], the best K, or those that were asked for
    values: Tensor  # [L, K]


def logprobs_of(rows: Sequence[SampleRow], logits: Tensor, tokens: Tensor) -> Logprobs | None:
    """For the rows that asked, of the raw logits [R, V], as sampler.py has them; tokens int64 [R]. None: nobody did."""
    asked = {r: row.params.num_logprobs for r, row in enumerate(rows) if row.params.logprobs is not None}
    if not asked:
        return None
    index = upload({"rows": np.array(list(asked), np.int64)}, logits.device)["rows"]
    raw = torch.log_softmax(logits.index_select(0, index).float(), -1)
    ids = raw.topk(min(max(1, *asked.values()), raw.shape[-1])).indices
    for i, r in enumerate(asked):
        if listed := rows[r].params.logprob_token_ids:
            ids[i, : len(listed)] = upload({"ids": np.array(listed, np.int64)}, logits.device)["ids"]
    chosen = raw.gather(-1, tokens.index_select(0, index).clamp(min=0)[:, None])[:, 0]
    return Logprobs(list(asked), list(asked.values()), chosen, ids, raw.gather(-1, ids))


@dataclass(frozen=True)
class Chosen:
    """Launched: `read()` gives tokens [R], then the logprobs' chosen, ids and values, then hidden states of the rows
    in `embeds`, once they are on the host."""

    read: Callable[[], list[Tensor]]
    logprobs: Logprobs | None
    embeds: Sequence[int] = ()
    read_scores: Callable[[], Scores] | None = None

    def tokens(self) -> list[Sampled]:
        """In the order of the batch's `sample_rows`, once the step is done."""
        tensors = self.read()
        sampled = [Sampled(token) for token in tensors[0].tolist()]
        if self.logprobs is not None:
            chosen, ids, values = (tensor.tolist() for tensor in tensors[1:4])
            for i, (row, count) in enumerate(zip(self.logprobs.rows, self.logprobs.counts, strict=True)):
                told = best_first(zip(ids[i][:count], values[i][:count], strict=True))
                sampled[row] = Sampled(sampled[row].token, chosen[i], told)
        for i, row in enumerate(self.embeds):
            sampled[row] = Sampled(NO_TOKEN, hidden=tensors[-1][i])
        return sampled

    def scores(self) -> Scores:
        assert self.read_scores is not None
        return self.read_scores()
