"""A rank's part of a step on a GPU: launched operation by operation, and read before the next one is begun."""

from __future__ import annotations

import torch

from pagewire_engine.batch import Batch
from pagewire_engine.gpu.changed_rows import sample_changed
from pagewire_engine.gpu.chosen import Chosen, logprobs_of
from pagewire_engine.gpu.inputs import chunk_arrays, row_arrays
from pagewire_engine.gpu.layer_events import LayerEvents
from pagewire_engine.gpu.mixed_step import MixedStep
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.sampling_rows import SamplingRows
from pagewire_engine.gpu.tables import DeviceTables
from pagewire_engine.gpu.transfers import Downloads, upload
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.layer_progress import LayerProgress
from pagewire_engine.model_runner import Arrays, Tensors, rows_that_embed
from pagewire_engine.parallel.peers import Peers
from pagewire_engine.sampler import Sampled


class GpuRankRunner:
    """A RankRunner (see model_runner.py). Also runs on CPU tensors: for tests."""

    def __init__(self, model: GpuModel, cache: KVCache, peers: Peers) -> None:
        self.cache, self.config = cache, model.config
        self._peers = peers
        self.progress = LayerProgress()
        self._layers = LayerEvents(self.progress, model.config.device)
        self._mixed = MixedStep(model, cache)
        self._tables = DeviceTables(model.config.device)
        self._sampling = SamplingRows()
        self._downloads = Downloads(model.config.device)

    def sampling(self, batch: Batch) -> Arrays:
        arrays = self._sampling.arrays(batch.sample_rows, batch.positions[batch.sample_from] + 1)
        return arrays | {"embeds": rows_that_embed(batch)}

    @torch.inference_mode()
    def compute(self, batch: Batch, sampling: Arrays) -> Tensors | None:
        """The rows' logits, and what those that embed have before it."""
        part, c = self._peers.part, self.config
        self.cache.copy_blocks(batch.copies)
        self._tables.update(batch)
        inputs = upload(row_arrays(batch, self.cache.block_size) | chunk_arrays(batch), c.device)
        before = None
        if not part.is_first:
            before = torch.empty(len(batch.input_ids), c.hidden_size, dtype=c.dtype, device=c.device)
            self._peers.receive(before)
        layer_done = self._layers.of(batch.number, batch.layer_group)
        hidden = self._mixed.hidden(inputs, batch.num_decode, self._tables, layer_done, before)
        if not part.is_last:
            self._peers.send(hidden)
            return None
        final = self._mixed.final(hidden, inputs["sample_from"])
        result = self._mixed.scores(hidden, batch.scored) if batch.scored else {}
        return result | {"logits": self._mixed.logits(final), "hidden": final[sampling["embeds"].tolist()].float()}

    @torch.inference_mode()
    def choose(self, batch: Batch, sampling: Arrays, result: Tensors) -> list[Sampled]:
        logits = result["logits"]
        num_tokens = batch.positions[batch.sample_from] + 1
        tokens = self._mixed.choose(logits, upload(sampling, self.config.device))
        sample_changed(batch.sample_rows, num_tokens, sampling, logits, tokens, batch.allowed)
        logprobs = logprobs_of(batch.sample_rows, logits, tokens)
        parts = [tokens] if logprobs is None else [tokens, logprobs.chosen, logprobs.ids, logprobs.values]
        embeds = sampling["embeds"].tolist()
        return Chosen(self._downloads.start([*parts, result["hidden"]]), logprobs, embeds).tokens()
