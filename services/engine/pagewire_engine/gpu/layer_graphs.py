"""Steps of any shape with CUDA graphs of all that lies between the attention of two layers.

Attention depends on the sequences, so it is launched step by step; the rest depends on the number of rows alone. Up to
several hundred rows the device computes faster than a host launches operation by operation.

All that a graph reads and writes besides weights and cache stays at the same place: the step's rows, q, what attention
makes of it, and the residual stream. A padding row writes no slot, and nobody reads what it gives.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pagewire_engine.gpu.attention import Attention
from pagewire_engine.gpu.graphs import Recorder
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.kv_cache import KVCache

# Rows. Padding costs little below 128, where a product reads its weight whatever their number; with more than the
# last a device computes longer than the host launches.
SIZES = (16, 32, 64, 96, *range(128, 769, 64), 896, 1024)


class LayerGraphs:
    """The forward pass of up to sizes[-1] rows, once `capture` has been called."""

    def __init__(self, model: GpuModel, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self.sizes: tuple[int, ...] = ()  # those of SIZES that are captured
        self._graphs: dict[int, list[Callable[[], None]]] = {}  # by size: of all layers' beginnings, and the end

    def capture(self, recorder: Recorder, max_rows: int) -> None:
        """max_rows: of a step; sizes that none needs would hold memory for nothing."""
        self.sizes = SIZES[: bisect_left(SIZES, max_rows) + 1]
        c, most = self._model.config, self.sizes[-1]
        rows = partial(torch.zeros, device=c.device, dtype=c.dtype)
        self._input_ids, self._positions = (torch.zeros(most, dtype=torch.int32, device=c.device) for _ in range(2))
        self._slots = torch.full_like(self._positions, -1)
        self._q, self._attended = (rows(most, c.num_heads, c.head_dim) for _ in range(2))
        self._residual, self._hidden = (rows(most, c.hidden_size) for _ in range(2))
        for size in reversed(self.sizes):
            steps = range(self._model.num_layers + 1)
            self._graphs[size] = [recorder.record(partial(self._compute, size, index)) for index in steps]

    def takes(self, num_rows: int) -> bool:
        return bool(self.sizes) and num_rows <= self.sizes[-1]

    def __call__(self, inputs: dict[str, Tensor], attention: Attention, layer_done: Callable[[int], None]) -> Tensor:
        """As GpuModel.forward; valid until the next step."""
        num_rows = len(inputs["input_ids"])
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        for name, rows in (("input_ids", self._input_ids), ("positions", self._positions), ("slots", self._slots)):
            rows[:num_rows].copy_(inputs[name])
        self._slots[num_rows:size].fill_(-1)
        graphs = self._graphs[size]
        graphs[0]()
        q, attended = self._q[:num_rows], self._attended[:num_rows]
        for index in range(self._model.num_layers):
            attention(q, *self._cache.layer(index), self._model.window(index), out=attended)
            layer_done(index + 1)
            graphs[index + 1]()
        return self._hidden[:num_rows]

    def _compute(self, size: int, index: int) -> None:
        """From the attention of layer `index` - 1, or from the token ids, to q of layer `index`, or to the end."""
        residual = self._residual[:size]
        if index == 0:
            residual.copy_(self._model.embed(self._input_ids[:size]))
            hidden = self._model.first_norm(residual)
        else:
            hidden = self._model.after_attention(index - 1, self._attended[:size], residual)
        if index < self._model.num_layers:
            positions, slots = self._positions[:size], self._slots[:size]
            self._model.queries(index, hidden, positions, slots, self._cache, out=self._q[:size])
        else:
            assert isinstance(hidden, Tensor)
            self._hidden[:size].copy_(hidden)
