"""A step of any shape: decoding rows, rows of draft tokens, chunks of prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pagewire_kernels import ops
from torch import Tensor

from pagewire_engine.batch import Scored
from pagewire_engine.gpu.attention import Attention
from pagewire_engine.gpu.graphs import Recorder
from pagewire_engine.gpu.layer_graphs import LayerGraphs
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.sampling_rows import neutral_sampling, plain_sampling
from pagewire_engine.gpu.tables import DeviceTables
from pagewire_engine.gpu.transfers import Arrays, upload
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.scoring import Tensors, score_rows


class MixedStep:
    """Logits of the rows that give tokens, the tokens, and the hidden states that the logits are of."""

    def __init__(self, model: GpuModel, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        config = model.local
        self._device = config.device
        self._neutral = neutral_sampling(config.vocab_size, config.device)
        self._graphs = LayerGraphs(model, cache)
        self._workspace = ops.decode_workspace(config.num_heads, config.num_kv_heads, config.head_dim, config.device)

    def capture(self, recorder: Recorder, max_rows: int) -> tuple[int, ...]:
        """Makes graphs for steps of few rows. Without them, and for more, operations are launched one by one.

        max_rows: of a step. Returns the graphs' sizes.
        """
        self._graphs.capture(recorder, max_rows)
        return self._graphs.sizes

    def __call__(
        self,
        arrays: Arrays,
        num_decode: int,
        tables: DeviceTables,
        previous: Tensor | None,
        layer_done: Callable[[int], None],
        scored: Scored | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """Logits [R, V], tokens int64 [R], hidden states [R, E], and the scores of `scored`.

        previous: what negative input ids refer to, if there are any.
        """
        inputs = upload(arrays, self._device)
        if previous is not None:
            ops.resolve_input_ids(inputs["input_ids"], previous)
        hidden = self.hidden(inputs, num_decode, tables, layer_done)
        final = self.final(hidden, inputs["sample_from"])
        logits = self.logits(final)
        scores = self.scores(hidden, scored) if scored else {}
        return logits, self.choose(logits, inputs), final, scores

    def hidden(
        self,
        inputs: dict[str, Tensor],
        num_decode: int,
        tables: DeviceTables,
        layer_done: Callable[[int], None],
        before: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, E]; layer_done, before: see GpuModel."""
        chunk_start = inputs["chunk_start"] if len(inputs["chunk_start"]) > 1 else None
        attention = Attention(
            num_decode, tables.rows(inputs["seats"]), inputs["seq_lens"], chunk_start, self._workspace
        )
        if before is None and self._graphs.takes(len(inputs["input_ids"])):
            return self._graphs(inputs, attention, layer_done)
        return self._model.forward(
            inputs["input_ids"], inputs["positions"], inputs["slots"], attention, self._cache, layer_done, before
        )  # fmt: skip

    def final(self, hidden: Tensor, sample_from: Tensor) -> Tensor:
        """The hidden states that tokens are chosen from, [R, E]."""
        return hidden.index_select(0, sample_from)

    def logits(self, final: Tensor) -> Tensor:
        """[R, V]"""
        return self._model.logits(final) if len(final) else final.new_empty(0, self._model.config.vocab_size)

    def scores(self, hidden: Tensor, scored: Scored) -> Tensors:
        """See score_rows; hidden: of the whole batch."""
        arrays = {"rows": scored.rows.astype(np.int64), "ids": scored.ids.astype(np.int64)}
        inputs, vocab_size = upload(arrays, self._device), self._model.config.vocab_size
        rows = hidden.index_select(0, inputs["rows"])
        return score_rows(rows, inputs["ids"], scored.num_top, vocab_size, lambda some: self.logits(some).float())

    def choose(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Tokens int64 [R]; inputs: the arrays of SamplingRows."""
        rows = len(logits)
        tokens = torch.empty(rows, dtype=torch.int64, device=self._device)
        if rows:
            seats = torch.arange(rows, dtype=torch.int32, device=self._device)
            ops.sample(logits, plain_sampling(inputs, self._neutral), seats, inputs["uniforms"], seats, tokens)
        return tokens
