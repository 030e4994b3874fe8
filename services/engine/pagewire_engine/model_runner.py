"""What runs a batch. `TorchRunner` is the plain one: any device, and the reference of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pagewire_engine.batch import Batch
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.sampler import Sampled, sample
from pagewire_engine.step_tensors import step_tensors


class Launched(Protocol):
    """A step that was started."""

    def tokens(self) -> list[Sampled]:
        """The tokens chosen for `batch.sample_rows`, in order, once the step is done. Called exactly once."""
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

    def launch(self, batch: Batch) -> Launched:
        """Starts the step; when its tokens are there the batch's KV is in the cache."""
        ...


@dataclass(frozen=True)
class Done:
    """A step that was complete when it was launched."""

    sampled: list[Sampled]

    def tokens(self) -> list[Sampled]:
        return self.sampled


class TorchRunner:
    """Copies, forward pass, logits and sampling with the ops of `pagewire_kernels.ops`, in the calling thread."""

    overlaps = False

    def __init__(self, model: DenseModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.config = model.config

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        self.cache.copy_blocks(batch.copies)
        hidden = self.model.forward(step_tensors(batch, self.cache.block_size, self.config.device), self.cache)
        if not batch.sample_rows:
            return Done([])
        rows = torch.from_numpy(batch.sample_from).to(self.config.device, torch.int64)
        num_tokens = (batch.positions[batch.sample_from] + 1).tolist()
        return Done(sample(self.model.logits(hidden[rows]), batch.sample_rows, num_tokens, batch.allowed))
