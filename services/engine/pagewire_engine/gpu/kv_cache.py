"""The KV pool on a GPU: perhaps in fp8; transfers read and write it beside the steps, on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pagewire_kernels import ops

from pagewire_engine.gpu.transfers import upload
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig


def cache_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """What --kv-cache-dtype `name` stores keys and values as."""
    return config.dtype if name == "auto" else torch.float8_e4m3fn


class GpuKVCache(KVCache):
    """kv of the model's dtype or e4m3."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, *, poison: bool = False
    ) -> None:
        super().__init__(replace(config, dtype=dtype), num_blocks, block_size, poison=poison)
        # What only moves is moved as bytes: few operations know e4m3.
        self._moved = self.kv.view(torch.uint8) if dtype.itemsize == 1 else self.kv
        self._beside = torch.cuda.Stream(config.device) if config.device.type == "cuda" else None
        # A step that is queued may still read a block that the books call free, to copy it: the event is behind it.
        self._last_use: dict[int, torch.cuda.Event] = {}

    def compile_copies(self) -> None:
        """What the first transfer would else wait for: moves a token out of a block and back, before any is in use."""
        self.scatter(self.gather([0], (0, 1), (0, 1)), [0], (0, 1), (0, 1))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:  # indices given as lists would be copied to the device while the host waits for it
            sources, destinations = np.array(pairs, np.int64).T
            index = upload({"sources": sources, "destinations": destinations}, self.kv.device)
            self._moved[:, :, index["destinations"]] = self._moved[:, :, index["sources"]]

    def freed(self, blocks: Sequence[int]) -> None:
        super().freed(blocks)
        if self._beside is not None:
            event = torch.cuda.Event()
            event.record()
            self._last_use.update(dict.fromkeys(blocks, event))

    def gather(
        self,
        block_table: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As KVCache; does not wait for steps that were launched since the tokens were computed."""
        with torch.cuda.stream(self._beside):
            return super().gather(block_table, layers, tokens, out)

    def scatter(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        """As KVCache; waits only for steps that were launched before the blocks became free."""
        first, last = tokens[0] // self.block_size, (tokens[1] - 1) // self.block_size
        events = {self._last_use[block] for block in block_table[first : last + 1] if block in self._last_use}
        with torch.cuda.stream(self._beside):
            for event in events:
                torch.cuda.current_stream().wait_event(event)
            super().scatter(wire, block_table, layers, tokens)

    def _pack(self, slots: torch.Tensor, layers: tuple[int, int], wire: torch.Tensor) -> None:
        wire.view(self._moved.dtype).copy_(ops.pack_kv(self._moved, slots, layers))

    def _unpack(self, wire: torch.Tensor, slots: torch.Tensor, layers: tuple[int, int]) -> None:
        ops.unpack_kv(wire.to(self.kv.device).view(self._moved.dtype), self._moved, slots, layers)
        if self._beside is not None:
            torch.cuda.current_stream().synchronize()
