"""The KV pools of a worker's ranks as one, so that a transfer is between two workers, however many ranks they have.

On a CPU rank 0 maps the pools of the others: their memory is a file without a name, whose descriptor a rank hands over.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.part import Part


class SharedMemory:
    """Where one pool lies. `allocate` makes or maps it; the descriptor is open until `close`."""

    def __init__(self, file: int | None = None) -> None:
        self.file = _nameless() if file is None else file
        self._made = file is None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._made:
            os.ftruncate(self.file, num_bytes)
        memory = mmap.mmap(self.file, num_bytes)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def close(self) -> None:
        """The memory stays as long as it is mapped."""
        os.close(self.file)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pagewire-kv", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Pool(Protocol):
    """As KVCache."""

    num_blocks: int
    block_size: int
    dtype: torch.dtype

    def gather(self, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]) -> torch.Tensor: ...
    def scatter(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None: ...
    def allocated(self, blocks: Sequence[int]) -> None: ...
    def freed(self, blocks: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class RankPool:
    """A rank's pool, and which layers and kv heads of the model are in it."""

    cache: Pool
    layers: tuple[int, int]
    heads: tuple[int, int]

    @classmethod
    def of(cls, cache: Pool, part: Part, config: ModelConfig) -> RankPool:
        return cls(cache, part.layers(config), part.kv_heads(config))

    def overlap(self, layers: tuple[int, int]) -> tuple[int, int]:
        """Which of the model's `layers` are here; empty if none."""
        begin = max(layers[0], self.layers[0])
        return begin, max(begin, min(layers[1], self.layers[1]))

    def own(self, layers: tuple[int, int]) -> tuple[int, int]:
        """The same layers by this pool's numbers."""
        return layers[0] - self.layers[0], layers[1] - self.layers[0]


class JoinedKVCache(KVCache):
    """Gathers from and scatters to the pools of all ranks. Block b is the same tokens in each of them.

    A kv head that several ranks hold is read from the first and written to all. Blocks are copied by the ranks
    themselves, each in its own part of a step.
    """

    def __init__(self, config: ModelConfig, pools: Sequence[RankPool]) -> None:
        first = pools[0].cache
        self.num_blocks, self.block_size, self.dtype = first.num_blocks, first.block_size, first.dtype
        self._config, self._pools = config, pools

    def allocated(self, blocks: Sequence[int]) -> None:
        for pool in self._pools:
            pool.cache.allocated(blocks)

    def freed(self, blocks: Sequence[int]) -> None:
        for pool in self._pools:
            pool.cache.freed(blocks)

    def gather(
        self,
        block_table: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        wire = self._new_wire(layers, tokens) if out is None else out
        done: set[tuple[tuple[int, int], tuple[int, int]]] = set()
        for pool in self._pools:
            found = pool.overlap(layers)
            if found[0] < found[1] and (found, pool.heads) not in done:
                done.add((found, pool.heads))
                part = pool.cache.gather(block_table, pool.own(found), tokens)
                wire[found[0] - layers[0] : found[1] - layers[0], :, :, slice(*pool.heads)] = part
        return wire

    def scatter(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        for pool in self._pools:
            found = pool.overlap(layers)
            if found[0] < found[1]:
                part = wire[found[0] - layers[0] : found[1] - layers[0], :, :, slice(*pool.heads)]
                pool.cache.scatter(part.contiguous(), block_table, pool.own(found), tokens)
