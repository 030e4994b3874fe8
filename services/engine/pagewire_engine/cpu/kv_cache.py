"""The KV pool in the pages that the compiled CPU step reads; on the wire it looks like any other."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence

import torch
from pagewire_kernels.cpu.library import LEAST_SUMMED_BYTES, Model

from pagewire_engine.kv_cache import Allocate, KVCache, empty
from pagewire_engine.models.config import ModelConfig

_AHEAD_BYTES = 256 << 20  # of blocks beyond those in use
_STRETCH_BYTES = 2 << 20  # touched at once, per layer and K or V: a huge page


class PackedKVCache(KVCache):
    """kv [num_layers, 2, num_blocks, num_kv_heads, block_size * head_dim]; the order within is kv_pages.h's.

    The system provides memory when a page is first written, which makes the writing many times slower
    than the step around it. A thread that runs when nothing else does writes ahead of the blocks in use.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        poison: bool = False,
        allocate: Allocate = empty,
    ) -> None:
        super().__init__(config, num_blocks, block_size, poison=poison, allocate=allocate)
        self._library = library
        library.pw_use_huge_pages(self.kv.data_ptr(), self.kv.nbytes)
        self.model = Model(
            heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim, layers=config.num_layers,
            block_size=block_size, num_blocks=num_blocks, half=config.dtype == torch.bfloat16,
            cache=self.kv.data_ptr(),
        )  # fmt: skip
        self._ahead = _Ahead(library, self.kv)
        weakref.finalize(self, self._ahead.stop)
        if not poison:  # else all of it has been written
            self._ahead.start()

    def allocated(self, blocks: Sequence[int]) -> None:
        self._ahead.reached(max(blocks, default=0))

    def _shape(self, config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size * config.head_dim)

    def gather_checked(
        self, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor
    ) -> int:
        if wire.nbytes < LEAST_SUMMED_BYTES:
            return super().gather_checked(block_table, layers, tokens, wire)
        return self._move(self.slots(block_table, *tokens), layers, wire, to_wire=True, summed=True)

    def scatter_checked(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> int:
        if wire.nbytes < LEAST_SUMMED_BYTES:
            return super().scatter_checked(wire, block_table, layers, tokens)
        return self._move(self.slots(block_table, *tokens), layers, wire, to_wire=False, summed=True)

    def _pack(self, slots: torch.Tensor, layers: tuple[int, int], wire: torch.Tensor) -> None:
        self._move(slots, layers, wire, to_wire=True)

    def _unpack(self, wire: torch.Tensor, slots: torch.Tensor, layers: tuple[int, int]) -> None:
        self._move(slots, layers, wire.contiguous(), to_wire=False)

    def _move(
        self, slots: torch.Tensor, layers: tuple[int, int], wire: torch.Tensor, *, to_wire: bool, summed: bool = False
    ) -> int:
        """The checksum of `wire` if it is wanted."""
        assert wire.dtype == self.kv.dtype and wire.is_contiguous()
        found = ctypes.c_uint64()
        self._library.pw_move_kv(
            ctypes.byref(self.model), slots.data_ptr(), len(slots), *layers, wire.data_ptr(), wire.nbytes, int(to_wire),
            ctypes.byref(found) if summed else None,
        )  # fmt: skip
        return found.value


class _Ahead(threading.Thread):
    """Touches `kv` up to _AHEAD_BYTES beyond the furthest block that was `reached`; ends when there is no more."""

    def __init__(self, library: ctypes.CDLL, kv: torch.Tensor) -> None:
        super().__init__(name="kv-memory", daemon=True)
        self._library, self._kv = library, kv
        self._furthest = 0
        self._more = threading.Event()
        self._stopping = False

    def reached(self, block: int) -> None:
        if block > self._furthest:
            self._furthest = block
            self._more.set()

    def stop(self) -> None:
        self._stopping = True
        self._more.set()

    def run(self) -> None:
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread alone
        parts = self._kv.flatten(0, 1)  # of a layer, K or V: [parts, blocks, ...]
        part_bytes, num_blocks = parts[0].nbytes, len(parts[0])
        block_bytes = part_bytes // num_blocks
        ahead = _AHEAD_BYTES // (block_bytes * len(parts))
        stretch = max(1, _STRETCH_BYTES // block_bytes)
        touched = 0
        while touched < num_blocks and not self._stopping:
            if touched > self._furthest + ahead:
                self._more.wait()
                self._more.clear()
                continue
            end = min(touched + stretch, num_blocks)
            for part in range(len(parts)):
                begin = self._kv.data_ptr() + part * part_bytes + touched * block_bytes
                self._library.pw_touch(begin, (end - touched) * block_bytes)
            touched = end
