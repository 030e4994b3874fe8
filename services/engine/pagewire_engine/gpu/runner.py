"""Runs batches on a GPU, one ahead of the engine that reads their tokens.

`launch` sends the step's small arrays up, queues the forward pass, the choice of tokens and their copy to the host, and
returns. Nothing in it waits for the device. Steps run in order on one stream, copies to the host on another.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
import torch
from torch import Tensor

from pagewire_engine.batch import Batch
from pagewire_engine.gpu.changed_rows import sample_changed
from pagewire_engine.gpu.chosen import Chosen, logprobs_of
from pagewire_engine.gpu.decode_step import DecodeStep
from pagewire_engine.gpu.graphs import Recorder
from pagewire_engine.gpu.inputs import chunk_arrays, row_arrays, samples_each_row
from pagewire_engine.gpu.layer_events import LayerEvents
from pagewire_engine.gpu.mixed_step import MixedStep
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.sampling_rows import SamplingRows
from pagewire_engine.gpu.tables import DeviceTables
from pagewire_engine.gpu.transfers import Arrays, Downloads
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.layer_progress import LayerProgress
from pagewire_engine.model_runner import rows_that_embed
from pagewire_engine.scoring import Scores

log = structlog.get_logger(__name__)


class GpuRunner:
    """A Runner (see model_runner.py) that overlaps. Also runs on CPU tensors, without graphs: for tests."""

    overlaps = True

    def __init__(self, model: GpuModel, cache: KVCache, max_num_seqs: int, max_model_len: int) -> None:
        self.cache = cache
        self.config = model.config
        max_blocks = -(-max_model_len // cache.block_size)
        self._decode = DecodeStep(model, cache, max_num_seqs, max_blocks)
        self._mixed = MixedStep(model, cache)
        self.progress = LayerProgress()
        self._layers = LayerEvents(self.progress, model.config.device)
        self._tables = DeviceTables(model.config.device)
        self._sampling = SamplingRows()
        self._downloads = Downloads(model.config.device)
        self._tokens = torch.empty(0, dtype=torch.int64, device=model.config.device)  # of the last launch

    @torch.inference_mode()
    def capture_graphs(self, max_rows: int) -> None:
        """Makes the CUDA graphs of steps of up to `max_rows` rows. Without one, a step is launched bit by bit."""
        started, recorder = time.perf_counter(), Recorder(self.config.device)
        self._decode.capture(recorder)
        mixed = self._mixed.capture(recorder, max_rows)
        seconds = round(time.perf_counter() - started, 2)
        log.info("cuda graphs captured", decode=self._decode.sizes, mixed=mixed, seconds=seconds)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Chosen:
        """Starts the step; see Runner."""
        try:
            return self._launch(batch)
        except Exception:  # the next step is composed as if this one had been launched, and may refer to its tokens
            num_tokens, device = len(batch.sample_rows), self.config.device
            self._tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
            raise

    def _launch(self, batch: Batch) -> Chosen:
        self._tables.update(batch)
        self.cache.copy_blocks(batch.copies)
        num_tokens = batch.positions[batch.sample_from] + 1
        sampling = self._sampling.arrays(batch.sample_rows, num_tokens)
        embeds = rows_that_embed(batch).tolist()
        logits, tokens, hidden, scores = self._run(batch, sampling, with_hidden=bool(embeds))
        tokens = tokens.clone()  # the next step overwrites them while they are on their way to the host
        sample_changed(batch.sample_rows, num_tokens, sampling, logits, tokens, batch.allowed)
        logprobs = logprobs_of(batch.sample_rows, logits, tokens)
        self._tokens = tokens
        parts = [tokens] if logprobs is None else [tokens, logprobs.chosen, logprobs.ids, logprobs.values]
        if embeds and hidden is not None:
            parts.append(hidden[embeds].float())
        return Chosen(self._downloads.start(parts), logprobs, embeds, self._scores(scores))

    def rest(self) -> None:
        pass

    def _scores(self, scores: dict[str, Tensor]) -> Callable[[], Scores] | None:
        """Reads them, once they are on the host."""
        if not scores:
            return None
        read = self._downloads.start([*scores.values()])
        return lambda: Scores.of(dict(zip(scores, read(), strict=True)))

    def _run(
        self, batch: Batch, sampling: Arrays, with_hidden: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        arrays = row_arrays(batch, self.cache.block_size) | sampling
        previous = self._tokens if (batch.input_ids < 0).any() else None
        if not with_hidden and samples_each_row(batch) and len(batch.seats) <= self._decode.sizes[-1]:
            return *self._decode(arrays, self._tables, previous), None, {}
        layer_done = self._layers.of(batch.number, batch.layer_group)
        arrays |= chunk_arrays(batch)
        return self._mixed(arrays, batch.num_decode, self._tables, previous, layer_done, batch.scored)
