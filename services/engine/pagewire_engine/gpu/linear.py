"""y = x W^T + b on a GPU, for every way a weight can be stored.

T rows, K inputs, N outputs. An activation is a tensor [T, K] in the model's dtype or, for fp8 weights, rows that the
operation before has already quantized (`Fp8Rows`). Weights stored in int8 and int4 are multiplied in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from pagewire_kernels import ops
from pagewire_kernels.int4 import pack_int4
from torch import Tensor

from pagewire_engine.quantization import Scheme, quantize


@dataclass(frozen=True)
class Fp8Rows:
    """values float8_e4m3fn [T, K] times scales float32 [T]."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> Fp8Rows:
        values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
        return cls(values, torch.empty(num_rows, dtype=torch.float32, device=device))


Activation = Tensor | Fp8Rows


class Weight(Protocol):
    """A matrix [N, K] in some form."""

    @property
    def num_bytes(self) -> int: ...

    def multiply(self, x: Activation, bias: Tensor | None, out: Tensor) -> None:
        """out [T, N] = x [T, K] times the transposed matrix, plus bias [N]."""


@dataclass(frozen=True)
class DenseWeight:
    transposed: Tensor  # [K, N], a view of [N, K]

    @property
    def num_bytes(self) -> int:
        return self.transposed.nbytes

    def multiply(self, x: Activation, bias: Tensor | None, out: Tensor) -> None:
        assert isinstance(x, Tensor)
        if _is_for_gemv(x):
            ops.gemv(x, self.transposed.t(), out, bias)
        elif bias is None:
            torch.mm(x, self.transposed, out=out)
        else:
            torch.addmm(bias, x, self.transposed, out=out)


@dataclass(frozen=True)
class Int8Weight:
    q: Tensor  # int8 [N, K]
    scales: Tensor  # float32 [N] or [N, K / group]

    @property
    def num_bytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes

    def multiply(self, x: Activation, bias: Tensor | None, out: Tensor) -> None:
        assert isinstance(x, Tensor)
        ops.gemm_w8(x, self.q, self.scales, out, bias)


@dataclass(frozen=True)
class Int4Weight:
    packed: Tensor  # uint8 [N, K / 2]
    scales: Tensor  # float16 [N, K / group]
    group: int

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def multiply(self, x: Activation, bias: Tensor | None, out: Tensor) -> None:
        assert isinstance(x, Tensor)
        ops.gemm_w4(x, self.packed, self.scales, self.group, out, bias)


@dataclass(frozen=True)
class Fp8Weight:
    q: Tensor  # float8_e4m3fn [N, K]
    scales: Tensor  # float32 [N]

    @property
    def num_bytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes

    def multiply(self, x: Activation, bias: Tensor | None, out: Tensor) -> None:
        rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
        ops.gemm_fp8(rows.values, rows.scales, self.q, self.scales, out, bias)


@dataclass(frozen=True)
class Linear:
    """A weight [N, K], its bias [N] and the dtype of what it gives."""

    weight: Weight
    num_outputs: int
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Activation, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N], in `out` if there is one."""
        if out is None:
            rows = x.values if isinstance(x, Fp8Rows) else x
            out = torch.empty(len(rows), self.num_outputs, dtype=self.dtype, device=rows.device)
        self.weight.multiply(x, self.bias, out)
        return out

    def gated(self, x: Activation) -> Tensor:
        """[T, K] -> [T, N / 2]: silu(first half) * second half of what it gives."""
        if isinstance(x, Tensor) and isinstance(self.weight, DenseWeight) and self.bias is None and not _is_for_gemv(x):
            out = x.new_empty(len(x), self.num_outputs // 2)
            ops.gemm_gated(x, self.weight.transposed.t(), out)
            return out
        both = self(x)
        return ops.silu_and_mul(both, both.new_empty(len(both), self.num_outputs // 2))


def _is_for_gemv(x: Tensor) -> bool:
    """A single row, on a GPU: all of the time goes into reading the weight."""
    return len(x) == 1 and x.is_cuda


def make_linear(weight: Tensor, bias: Tensor | None, scheme: Scheme | None) -> Linear:
    """Stores `weight` [N, K] as `scheme` says (None: as it is). Raises StartupError if it cannot."""
    return Linear(_store(weight, scheme), len(weight), bias, weight.dtype)


def _store(weight: Tensor, scheme: Scheme | None) -> Weight:
    if scheme is None:
        return DenseWeight(weight.t())
    made = quantize(weight, scheme)
    if scheme.name == "int4":
        return Int4Weight(pack_int4(made.q), made.scales.half(), made.group)  # exact: they were made to fit
    scales = made.scales[:, 0].contiguous() if made.scales.shape[1] == 1 else made.scales
    return Int8Weight(made.q, scales) if scheme.name == "int8" else Fp8Weight(made.q, scales)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x [T, K], each row over its own scale."""
    rows = Fp8Rows.empty(len(x), x.shape[1], x.device)
    ops.quantize_fp8_rows(x, rows.values, rows.scales)
    return rows
