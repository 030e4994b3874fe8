"""The KV pool in the pages that the compiled CPU step reads; on the wire it looks like any other."""

from __future__ import annotations

import ctypes

import torch
from pagewire_kernels.cpu.library import Model

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig


class PackedKVCache(KVCache):
    """kv [num_layers, 2, num_blocks, num_kv_heads, block_size * head_dim]; the order within is attention.h's."""

    def __init__(
        self, library: ctypes.CDLL, config: ModelConfig, num_blocks: int, block_size: int, *, poison: bool = False
    ) -> None:
        super().__init__(config, num_blocks, block_size, poison=poison)
        self._library = library
        library.pw_use_huge_pages(self.kv.data_ptr(), self.kv.nbytes)
        self.model = Model(
            heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim, layers=config.num_layers,
            block_size=block_size, num_blocks=num_blocks, half=config.dtype == torch.bfloat16,
            cache=self.kv.data_ptr(),
        )  # fmt: skip

    def _shape(self, config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size * config.head_dim)

    def _pack(self, slots: torch.Tensor, layers: tuple[int, int]) -> torch.Tensor:
        shape = (layers[1] - layers[0], 2, len(slots), self.model.kv_heads, self.model.head_dim)
        wire = torch.empty(shape, dtype=self.kv.dtype)
        self._move(slots, layers, wire, to_wire=True)
        return wire

    def _unpack(self, wire: torch.Tensor, slots: torch.Tensor, layers: tuple[int, int]) -> None:
        self._move(slots, layers, wire.contiguous(), to_wire=False)

    def _move(self, slots: torch.Tensor, layers: tuple[int, int], wire: torch.Tensor, *, to_wire: bool) -> None:
        assert wire.dtype == self.kv.dtype
        self._library.pw_move_kv(
            ctypes.byref(self.model), slots.data_ptr(), len(slots), *layers, wire.data_ptr(), int(to_wire)
        )
