"""Runs a batch: copies, forward pass, logits, sampling. The only user of the device between steps."""

from __future__ import annotations

import torch

from pagewire_engine.batch import Batch
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.sampler import Sampled, sample


class ModelRunner:
    def __init__(self, model: DenseModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """The tokens chosen for `batch.sample_rows`, in order; the batch's KV is in the cache."""
        self.cache.copy_blocks(batch.copies)
        hidden = self.model.forward(batch, self.cache)
        if not batch.sample_rows:
            return []
        return sample(self.model.logits(hidden[batch.sample_from]), batch.sample_rows)
