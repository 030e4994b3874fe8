"""The KV pool of one engine: a single tensor, and the ways bytes get in and out of it.

    kv  [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]

A slot is block * block_size + offset. The wire layout is [layers, 2, tokens, num_kv_heads, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pagewire.v1 import kv_channel_pb2 as pb
from pagewire_kernels import ops
from pagewire_transfer.wire import checksum

from pagewire_engine.models.config import ModelConfig

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of this process alone."""
    return torch.empty(shape, dtype=dtype, device=device)


class KVCache:
    """Pages for every layer. Gather and scatter may run on any thread, on blocks no step writes."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, *, poison: bool = False, allocate: Allocate = empty
    ) -> None:
        self.kv = allocate(self._shape(config, num_blocks, block_size), config.dtype, config.device)
        self.dtype = self.kv.dtype
        self.num_blocks, self.block_size = num_blocks, block_size
        self._config = config
        self._poison = poison
        if poison:
            self.kv.fill_(torch.nan)

    def _shape(self, config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, [num_blocks, block_size, num_kv_heads, head_dim] each."""
        return self.kv[index, 0], self.kv[index, 1]

    @property
    def layout(self) -> pb.KvLayout:
        c, dtype = self._config, str(self.dtype).removeprefix("torch.")
        return pb.KvLayout(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, dtype=dtype)

    @property
    def bytes_per_token(self) -> int:
        c = self._config
        return c.num_layers * 2 * c.num_kv_heads * c.head_dim * self.dtype.itemsize

    def allocated(self, blocks: Sequence[int]) -> None:
        """Told which blocks are about to be used."""

    def freed(self, blocks: Sequence[int]) -> None:
        """Told which blocks became free; poisons them if that is asked for."""
        if self._poison:
            self.kv[:, :, list(blocks)] = torch.nan

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, destination) each: the copy of copy-on-write."""
        if pairs:
            sources, destinations = map(list, zip(*pairs, strict=True))
            self.kv[:, :, destinations] = self.kv[:, :, sources]

    def slots(self, block_table: Sequence[int], begin: int, end: int) -> torch.Tensor:
        """Slots of tokens [begin, end) of a sequence, int64."""
        positions = torch.arange(begin, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)[positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).to(self.kv.device)

    def gather(
        self,
        block_table: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tokens' KV in wire layout, on the CPU; in `out` if there is one."""
        wire = self._new_wire(layers, tokens) if out is None else out
        self._pack(self.slots(block_table, *tokens), layers, wire)
        return wire

    def _new_wire(self, layers: tuple[int, int], tokens: tuple[int, int]) -> torch.Tensor:
        c = self._config
        shape = (layers[1] - layers[0], 2, tokens[1] - tokens[0], c.num_kv_heads, c.head_dim)
        return torch.empty(shape, dtype=self.dtype)

    def scatter(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        """Writes wire-layout KV into the tokens' slots and returns when it is there."""
        self._unpack(wire, self.slots(block_table, *tokens), layers)

    def gather_checked(
        self, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor
    ) -> int:
        """As gather into `wire`; returns its checksum."""
        self.gather(block_table, layers, tokens, wire)
        return checksum(wire)

    def scatter_checked(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> int:
        """As scatter; returns the checksum of `wire`, and writes whatever it is."""
        found = checksum(wire)
        self.scatter(wire, block_table, layers, tokens)
        return found

    def _pack(self, slots: torch.Tensor, layers: tuple[int, int], wire: torch.Tensor) -> None:
        wire.copy_(ops.pack_kv(self.kv, slots, layers))

    def _unpack(self, wire: torch.Tensor, slots: torch.Tensor, layers: tuple[int, int]) -> None:
        ops.unpack_kv(wire.to(self.kv.device), self.kv, slots, layers)
        if self.kv.is_cuda:
            torch.cuda.current_stream().synchronize()
