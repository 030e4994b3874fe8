"""Quantized weights: how far they may be from the original, and the exact cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.errors import StartupError
from pagewire_engine.quantization import SCHEMES, Scheme, dequantize, quantize

GROUPED = [*SCHEMES.values(), Scheme("int8", 32), Scheme("int4", 64), Scheme("int4", 128)]


@pytest.mark.parametrize("scheme", GROUPED, ids=lambda s: f"{s.name}-{s.group}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_further_off_than_a_step_of_its_group(scheme: Scheme, dtype: torch.dtype) -> None:
    """A step is the scale; int4's positive end (7 of 8) may be clipped by one, fp8's steps grow with the value."""
    torch.manual_seed(0)
    weight = (torch.randn(37, 256) * torch.logspace(-3, 1, 37)[:, None]).to(dtype)
    made = quantize(weight, scheme)
    assert made.q.shape == weight.shape and made.scales.shape == (37, 256 // made.group)
    assert made.scales.dtype == torch.float32
    error = (dequantize(made) - weight.float()).abs().view(37, -1, made.group)
    steps = made.scales.abs()[..., None]
    values = weight.float().abs().view(37, -1, made.group)
    allowed = {"int8": 0.5 * steps, "int4": 1.01 * steps, "fp8": values / 16 + steps / 512}[scheme.name]
    assert (error <= 1.001 * allowed + 1e-9).all()


def test_int4_is_what_fits_in_four_bits_and_its_scales_in_a_half() -> None:
    made = quantize(torch.randn(8, 64), SCHEMES["int4"])
    assert made.q.dtype == torch.int8 and made.q.min() >= -8 and made.q.max() <= 7
    assert torch.equal(made.scales.half().float(), made.scales)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_rows_of_zeros_stay_zeros(scheme: Scheme) -> None:
    """A scale of 0 must not become 0 / 0."""
    weight = torch.zeros(4, 64)
    weight[1, 5] = 3.0
    assert torch.equal(dequantize(quantize(weight, scheme)), weight)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(["int8", "int4", "fp8"]))
def test_a_row_is_quantized_alike_alone_and_among_others(rows: int, seed: int, name: str) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    together = dequantize(quantize(weight, SCHEMES[name]))
    for row in range(rows):
        assert torch.equal(dequantize(quantize(weight[row : row + 1], SCHEMES[name]))[0], together[row])


def test_large_matrices_are_done_in_parts_and_come_back_whole() -> None:
    weight = torch.randn(5000, 32)
    made = quantize(weight, SCHEMES["int8"])
    assert made.q.shape == (5000, 32) and made.scales.shape == (5000, 1)
    assert ((dequantize(made) - weight).norm() / weight.norm()) < 0.01


def test_a_width_that_no_group_divides_is_said_at_start() -> None:
    with pytest.raises(StartupError, match="--quantization int8"):
        quantize(torch.randn(4, 112), SCHEMES["int4"])


def test_the_head_is_never_less_than_int8() -> None:
    assert [SCHEMES[name].for_head for name in ("int8", "int4", "fp8")] == [SCHEMES["int8"], SCHEMES["int8"], None]
