"""What runs a batch. `TorchRunner` is the plain one: any device, and the reference of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pagewire_engine.batch import Batch, Scored
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.layer_progress import LayerProgress
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.parallel.peers import ALONE, Peers
from pagewire_engine.sampler import NO_TOKEN, Sampled, sample
from pagewire_engine.scoring import Scores, score_rows
from pagewire_engine.step_tensors import step_tensors


class Launched(Protocol):
    """A step that was started."""

    def tokens(self) -> list[Sampled]:
        """The tokens chosen for `batch.sample_rows`, in order, once the step is done. Called exactly once."""
        ...

    def scores(self) -> Scores:
        """Of the rows in `batch.scored`. Called after `tokens`, if there are such rows."""
        ...


class Runner(Protocol):
    """The only user of the device between steps.

    overlaps: `launch` returns before the step is done, and the next batch may refer to its tokens by
    negative input ids. Steps take effect in the order of their launches.
    """

    @property
    def cache(self) -> KVCache: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def overlaps(self) -> bool: ...
    @property
    def progress(self) -> LayerProgress | None: ...  # None: its steps do not tell how far they are

    def launch(self, batch: Batch) -> Launched:
        """Starts the step; when its tokens are there the batch's KV is in the cache."""
        ...

    def rest(self) -> None:
        """Told when there is nothing to launch for a while; called by the thread that launches."""
        ...


Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


class RankRunner(Protocol):
    """A runner that does a rank's part of a step. Only `compute` runs on every rank; it may wait for the others."""

    @property
    def cache(self) -> KVCache: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def progress(self) -> LayerProgress: ...

    def sampling(self, batch: Batch) -> Arrays:
        """What `compute` has to know of the rows whose tokens are chosen, besides the batch."""
        ...

    def compute(self, batch: Batch, sampling: Arrays) -> Tensors | None:
        """Copies and forward pass. What tokens are chosen from, and scores of `batch.scored` (see score_rows).

        None unless this is the last stage of the model.

        `batch` may lack the sequences and `sample_rows`: they stay with who composed it.
        """
        ...

    def choose(self, batch: Batch, sampling: Arrays, result: Tensors) -> list[Sampled]:
        """The tokens, from what `compute` gave on the first rank of the last stage."""
        ...


def rows_that_embed(batch: Batch) -> np.ndarray:
    """int64: those of the rows to choose for that give their hidden state instead of a token."""
    return np.array([i for i, row in enumerate(batch.sample_rows) if row.params.embeds], np.int64)


@dataclass(frozen=True)
class Done:
    """A step that was complete when it was launched."""

    sampled: list[Sampled]
    scored: Scores | None = None

    @classmethod
    def with_scores(cls, batch: Batch, sampled: list[Sampled], result: Tensors) -> Done:
        """result: of `compute`; it has the scores, too."""
        return cls(sampled, Scores.of(result) if batch.scored else None)

    def tokens(self) -> list[Sampled]:
        return self.sampled

    def scores(self) -> Scores:
        assert self.scored is not None
        return self.scored


class TorchRunner:
    """Copies, forward pass, logits and sampling with the ops of `pagewire_kernels.ops`, in the calling thread."""

    overlaps = False

    def __init__(self, model: DenseModel, cache: KVCache, peers: Peers = ALONE) -> None:
        self.progress = LayerProgress()
        self.model = model
        self.cache = cache
        self.config = model.config
        self._peers = peers

    def launch(self, batch: Batch) -> Launched:
        sampling = self.sampling(batch)
        result = self.compute(batch, sampling)
        assert result is not None
        return Done.with_scores(batch, self.choose(batch, sampling, result), result)

    def sampling(self, batch: Batch) -> Arrays:
        """embeds: int64, the rows that give their hidden state."""
        return {"embeds": rows_that_embed(batch)}

    @torch.inference_mode()
    def compute(self, batch: Batch, sampling: Arrays) -> Tensors | None:
        """The rows' logits, and what those that embed have before it."""
        part, device = self._peers.part, self.config.device
        self.cache.copy_blocks(batch.copies)
        hidden = None
        if not part.is_first:
            size = len(batch.input_ids), self.config.hidden_size
            hidden = torch.empty(size, dtype=self.config.dtype, device=device)
            self._peers.receive(hidden)
        tensors, told = step_tensors(batch, self.cache.block_size, device), (batch.number, batch.layer_group)
        hidden = self.model.forward(tensors, self.cache, hidden, self.progress.of(*told))
        if not part.is_last:
            self._peers.send(hidden)
            return None
        result = self._scores(hidden, batch.scored) if batch.scored else {}
        if not len(batch.sample_from):
            return result
        rows = torch.from_numpy(batch.sample_from).to(device, torch.int64)
        final = self.model.final(hidden[rows])
        embeds = torch.from_numpy(sampling["embeds"]).to(device)
        return result | {"logits": self.model.logits(final), "hidden": final[embeds].float()}

    def _scores(self, hidden: torch.Tensor, scored: Scored) -> Tensors:
        """The logits of a piece go through the last norm and the head, which all ranks of the stage have a part of."""
        rows, ids = (torch.from_numpy(numbers).to(hidden.device).long() for numbers in (scored.rows, scored.ids))
        final = self.model.final(hidden[rows])
        return score_rows(final, ids, scored.num_top, self.config.vocab_size, self.model.logits)

    @torch.inference_mode()
    def choose(self, batch: Batch, sampling: Arrays, result: Tensors) -> list[Sampled]:
        if not batch.sample_rows:
            return []
        num_tokens = (batch.positions[batch.sample_from] + 1).tolist()
        sampled = sample(result["logits"], batch.sample_rows, num_tokens, batch.allowed)
        for i, row in enumerate(sampling["embeds"].tolist()):
            sampled[row] = Sampled(NO_TOKEN, hidden=result["hidden"][i].cpu())
        return sampled

    def rest(self) -> None:
        pass
