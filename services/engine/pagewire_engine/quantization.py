"""Weights in fewer bits: symmetric int8, int4 and fp8 (e4m3), made from an unquantized checkpoint at load time.

One form for every device: integers (or fp8) and the scales to multiply them with. The CPU and GPU runners pack
these same numbers each in their own order, so they compute the same model.

The int4 scale puts a group's value of largest magnitude at exactly -8, since the range -8..7 is one longer on that
side; so it may be negative. Groups of 32: on models/pagewire-demo the weights' relative error is 8.6 %, 9.6 % in groups
of 64, and the mean KL divergence of the next token 0.027 against 0.050 nats (int8 by rows 0.7 % and 0.0002, fp8 2.6 %
and 0.003). Searching a smaller scale with less squared error gained 4 % of the error and nothing in KL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pagewire_core.errors import StartupError
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_ROWS_AT_ONCE = 4096  # bounds the float32 copies of a large matrix


@dataclass(frozen=True)
class Scheme:
    """How matrices are stored. group: neighbouring inputs of a row that share a scale; 0: the whole row."""

    name: str
    group: int = 0

    @property
    def for_head(self) -> Scheme | None:
        """How the LM head is stored, the most sensitive matrix: int8 at least, and unquantized (None) for fp8."""
        return None if self.name == "fp8" else SCHEMES["int8"]


SCHEMES = {scheme.name: scheme for scheme in (Scheme("int8"), Scheme("int4", 32), Scheme("fp8"))}


@dataclass(frozen=True)
class QuantizedWeight:
    """weight[n, k] ~ q[n, k] * scales[n, k // group].

    q: int8 [N, K] (int4: values in -8..7, not packed) or float8_e4m3fn [N, K]. scales: float32 [N, K / group], of which
    int4's are exactly representable in float16.
    """

    q: Tensor
    scales: Tensor
    group: int


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """weight [N, K] of any float dtype, on any device. Raises StartupError if K is no multiple of the group."""
    group = scheme.group or weight.shape[1]
    if weight.shape[1] % group:
        raise StartupError(
            f"--quantization {scheme.name} shares a scale among {group} inputs, and this model has a matrix with "
            f"{weight.shape[1]}, which is no multiple; use --quantization int8"
        )
    parts = [_quantize_rows(rows.float(), scheme.name, group) for rows in weight.split(_ROWS_AT_ONCE)]
    return QuantizedWeight(torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts]), group)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K]."""
    rows, width = weight.q.shape
    grouped = weight.q.float().view(rows, width // weight.group, weight.group)
    return (grouped * weight.scales[..., None]).view(rows, width)


def _quantize_rows(weight: Tensor, name: str, group: int) -> tuple[Tensor, Tensor]:
    grouped = weight.view(len(weight), -1, group)
    if name == "int4":
        q, scales = _int4(grouped)
    elif name == "int8":
        scales = grouped.abs().amax(-1) / 127
        q = _divide(grouped, scales).round().to(torch.int8)
    else:
        scales = grouped.abs().amax(-1) / _FP8_MAX
        q = _divide(grouped, scales).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
    return q.view(weight.shape), scales


def _int4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0]
    scales = (largest / -8).half().float()
    return _divide(grouped, scales).round().clamp(-8, 7).to(torch.int8), scales


def _divide(grouped: Tensor, scales: Tensor) -> Tensor:
    """A group of zeros has scale 0 and stays zeros."""
    return grouped / torch.where(scales == 0, 1.0, scales)[..., None]
