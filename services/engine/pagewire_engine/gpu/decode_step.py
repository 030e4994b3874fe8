"""The step of sequences that decode one token each: a CUDA graph for every batch size that is worth one.

All that a graph reads and writes stays at the same place for ever:

    packed   input ids, positions, slots, lengths and sampling parameters, uploaded as one piece before the step
    block_tables   written before the graph, as are the input ids that refer to tokens of the step before
    logits, tokens   what the step gives; valid until the next one is launched

A batch is padded to the next size; a padding row has no keys, writes no slot and its token is ignored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import structlog
import torch
from pagewire_kernels import ops
from torch import Tensor

from pagewire_engine.gpu.attention import Attention
from pagewire_engine.gpu.graphs import Recorder
from pagewire_engine.gpu.inputs import pad_rows
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.sampling_rows import PLAIN, neutral_sampling, plain_sampling
from pagewire_engine.gpu.tables import DeviceTables
from pagewire_engine.gpu.transfers import Arrays, packed_size, send, views
from pagewire_engine.kv_cache import KVCache

log = structlog.get_logger(__name__)

_DTYPES = {
    **dict.fromkeys(("seats", "seq_lens", "input_ids", "positions", "slots"), np.int32),
    **PLAIN,
    "uniforms": np.float64,
}


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every multiple of 8 up to 256 and of 16 beyond: vLLM's sizes; the last is max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeStep:
    """One forward pass and one token for each of up to `max_num_seqs` sequences."""

    def __init__(self, model: GpuModel, cache: KVCache, max_num_seqs: int, max_blocks: int) -> None:
        self._model, self._cache = model, cache
        self.sizes = graph_sizes(max_num_seqs)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._inputs: dict[int, dict[str, Tensor]] = {}  # by size: parts of `packed`
        config, device = model.config, model.config.device
        one = {name: np.zeros(max_num_seqs, dtype) for name, dtype in _DTYPES.items()}
        self._packed = torch.zeros(packed_size(one), dtype=torch.uint8, device=device)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._logits = torch.zeros(max_num_seqs, config.vocab_size, dtype=config.dtype, device=device)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows = torch.arange(max_num_seqs, dtype=torch.int32, device=device)
        self._neutral = neutral_sampling(config.vocab_size, device)
        self._workspace = ops.decode_workspace(config.num_heads, config.num_kv_heads, config.head_dim, device)

    def __call__(self, arrays: Arrays, tables: DeviceTables, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and tokens int64 [B]. previous: what negative input ids refer to, if there are any."""
        rows = len(arrays["seats"])
        size = self.sizes[bisect_left(self.sizes, rows)]
        inputs = self._prepare({name: arrays[name] for name in _DTYPES}, size, tables, previous)
        graph = self._graphs.get(size)
        if graph is None:
            self._compute(inputs, size)
        else:
            graph()
        return self._logits[:rows], self._tokens[:rows]

    def capture(self, recorder: Recorder) -> None:
        """Makes the graphs."""
        tables = DeviceTables(self._packed.device)
        tables.tables = torch.zeros(1, self._block_tables.shape[1], dtype=torch.int32, device=self._packed.device)
        nothing = {name: np.zeros(0, dtype) for name, dtype in _DTYPES.items()}
        for size in reversed(self.sizes):
            inputs = self._prepare(nothing, size, tables, None)
            self._graphs[size] = recorder.record(partial(self._compute, inputs, size))

    def _prepare(self, arrays: Arrays, size: int, tables: DeviceTables, previous: Tensor | None) -> dict[str, Tensor]:
        padded = pad_rows(arrays, size)
        if size not in self._inputs:
            self._inputs[size] = views(self._packed, padded)
        inputs = self._inputs[size]
        send(padded, self._packed)
        tables.rows(inputs["seats"], out=self._block_tables[:size])
        if previous is not None:
            ops.resolve_input_ids(inputs["input_ids"], previous)
        return inputs

    def _compute(self, inputs: dict[str, Tensor], size: int) -> None:
        """Reads and writes nothing but the buffers of this object, the weights and the cache."""
        attention = Attention(size, self._block_tables[:size], inputs["seq_lens"], None, self._workspace)
        hidden = self._model.forward(
            inputs["input_ids"], inputs["positions"], inputs["slots"], attention, self._cache
        )  # fmt: skip
        logits = self._model.logits(hidden, self._logits[:size])
        rows = self._rows[:size]  # also where tokens so far are asked for: no row has a minimum of them
        ops.sample(logits, plain_sampling(inputs, self._neutral), rows, inputs["uniforms"], rows, self._tokens[:size])
