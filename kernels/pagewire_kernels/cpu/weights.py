"""Weights in the packed forms of linear.h, in memory that this module owns."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch

from pagewire_kernels.cpu.library import STRIP, Linear

F32, BF16, INT8, INT8_GROUPED, INT4 = range(5)
_BITS = {F32: 32, BF16: 16, INT8: 8, INT8_GROUPED: 8, INT4: 4}


@dataclass(frozen=True)
class Quantized:
    """q int8 [N, K] (int4: values -8..7), scales float32 [N, K / group]; group 0: one scale a row. bits: 8 or 4."""

    q: torch.Tensor
    scales: torch.Tensor
    group: int
    bits: int


class PackedLinear:
    """A linear layer for the compiled step; `struct` is what the step reads, valid while this object lives."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: torch.Tensor | Quantized,
        bias: torch.Tensor | None = None,
        *,
        interleave: bool = False,
    ) -> None:
        """weight: float32 or bfloat16 [N, K], or quantized. interleave: N is gate and up, to be put side by side."""
        values = weight.q if isinstance(weight, Quantized) else weight
        n, k = values.shape
        self.kind, group = _kind(weight)
        half = -(-(n // 2) // 16) * 16 if interleave else 0
        packed_n = -(-2 * half // STRIP) * STRIP if interleave else -(-n // STRIP) * STRIP
        packed_k = -(-k // (group or 16)) * (group or 16)
        self.num_bytes = packed_n * packed_k * _BITS[self.kind] // 8
        self._weight = _allocate(self, library, self.num_bytes)
        self._scales: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        sizes = (n, k, packed_n, packed_k, half)
        if isinstance(weight, Quantized):
            self._pack_quantized(library, weight, sizes)
        else:
            function = library.pw_pack_f32 if self.kind == F32 else library.pw_pack_bf16
            function(weight.contiguous().data_ptr(), *sizes, self._weight)
        if bias is not None:
            self._bias = _packed_bias(bias, packed_n, half)
        self.struct = Linear(
            self.kind, packed_n, packed_k, group, self._weight, _pointer(self._scales), _pointer(self._sums),
            _pointer(self._bias),
        )  # fmt: skip

    def _pack_quantized(self, library: ctypes.CDLL, weight: Quantized, sizes: tuple[int, ...]) -> None:
        packed_n, packed_k = sizes[2:4]
        groups = packed_k // weight.group if weight.group else 1
        packed_scales = self._scales = torch.empty(packed_n * groups, dtype=torch.float32)
        packed_sums = self._sums = torch.empty(packed_n * groups, dtype=torch.int32)
        q, scales = weight.q.contiguous(), weight.scales.float().contiguous()
        source = (q.data_ptr(), scales.data_ptr(), *sizes, weight.group, self._weight, packed_scales.data_ptr())
        if self.kind == INT4:
            library.pw_pack_int4(*source)
        else:
            library.pw_pack_int8(*source, packed_sums.data_ptr())


def _kind(weight: torch.Tensor | Quantized) -> tuple[int, int]:
    if isinstance(weight, Quantized):
        if weight.bits == 4:
            return INT4, weight.group
        return (INT8_GROUPED, weight.group) if weight.group else (INT8, 0)
    return {torch.float32: F32, torch.bfloat16: BF16}[weight.dtype], 0


def _packed_bias(bias: torch.Tensor, packed_n: int, half: int) -> torch.Tensor:
    packed = torch.zeros(packed_n, dtype=torch.float32)
    if not half:
        packed[: len(bias)] = bias.float()
        return packed
    strips = packed.view(-1, 2, 16)
    for part, values in enumerate(bias.float().chunk(2)):
        padded = torch.zeros(len(strips) * 16)
        padded[: len(values)] = values
        strips[:, part] = padded.view(-1, 16)
    return packed


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _allocate(owner: object, library: ctypes.CDLL, num_bytes: int) -> int:
    address = library.pw_allocate(num_bytes)
    if not address:
        raise MemoryError(f"{num_bytes} bytes for packed weights")
    weakref.finalize(owner, library.pw_release, address)
    return int(address)
