"""The products with quantized weights against the torch reference, as kernels_vs_reference.py does for attention."""

import os

import pytest
import torch
from pagewire_kernels import gemm_gated, gemm_quantized, gemv, reference_linear
from pagewire_kernels.dequantize import dequantize
from pagewire_kernels.int4 import pack_int4
from pagewire_kernels.weight_tiles import FP8_ROWS, INT4_GROUPS, INT8_GROUPS, INT8_ROWS

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FP8 = torch.float8_e4m3fn
GENERATOR = torch.Generator().manual_seed(0)
KINDS = {"int8 rows": INT8_ROWS, "int8 groups": INT8_GROUPS, "int4 groups": INT4_GROUPS, "fp8 rows": FP8_ROWS}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_odd_shapes(kind: str, num_rows: int, bias: bool) -> None:
    """K ends inside a tile, N in the middle of one, rows fill no tile."""
    check_product(kind, num_rows, 37, 224, 32, torch.float32, bias=bias)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("kind", ["int8 groups", "int4 groups"])
def test_groups_narrower_and_wider_than_a_tile(kind: str, num_rows: int, group: int) -> None:
    check_product(kind, num_rows, 33, 384, group, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 40, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_half_types(kind: str, num_rows: int, dtype: torch.dtype) -> None:
    """A tile shape of its own for each number of rows."""
    check_product(kind, num_rows, 140, 320, 64, dtype)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_split_between_programs(kind: str, splits: int) -> None:
    """Six iterations: with eight splits some have nothing to add."""
    check_product(kind, 3, 40, 384, 32, torch.float32, bias=True, splits=splits)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("kind", [INT8_ROWS, INT8_GROUPS, INT4_GROUPS])
def test_weights_are_unpacked(kind: int, group: int) -> None:
    """Rows and columns that fill no tile; the scales of groups narrower and wider than one."""
    if (kind == INT8_ROWS) != (group == 0):
        pytest.skip("rows have one scale")
    q = torch.randint(-8, 8, (21, 384), dtype=torch.int8, generator=GENERATOR).to(DEVICE)
    scales = torch.rand(21, 384 // group if group else 1, generator=GENERATOR).to(DEVICE)
    weight = pack_int4(q) if kind == INT4_GROUPS else q
    dense = dequantize(kind.value, weight, scales if group else scales[:, 0], 384, group, torch.float32)
    assert torch.equal(dense, q.float() * scales.repeat_interleave(384 // scales.shape[1], 1))


def test_the_smallest_and_largest_integers() -> None:
    """-128 to 127, and -8 to 7 in both halves of a byte, times a scale that is exact."""
    x = torch.eye(256, device=DEVICE)[:16]
    x[:, 16:] = 0
    q = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE).view(256, 1).expand(256, 32).contiguous()
    out = torch.empty(16, 256, device=DEVICE)
    gemm_quantized.gemm_w8(x[:, :32].contiguous(), q, torch.full((256,), 0.5, device=DEVICE), out)
    assert torch.equal(out, 0.5 * q[:, :16].t().float())
    nibbles = torch.arange(-8, 8, dtype=torch.int8, device=DEVICE).repeat(2, 2)[:, :32].contiguous()
    out = torch.empty(32, 2, device=DEVICE)
    scales = torch.full((2, 1), -0.25, device=DEVICE, dtype=torch.float16)
    gemm_quantized.gemm_w4(torch.eye(32, device=DEVICE), pack_int4(nibbles), scales, 32, out)
    assert torch.equal(out, -0.25 * nibbles.t().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_row_times_a_dense_weight(dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(shape, generator=GENERATOR).to(dtype).to(DEVICE) for shape in ((1, 600), (37, 600), 37)
    )
    out, expected = torch.empty(1, 37, dtype=dtype, device=DEVICE), torch.empty(1, 37, dtype=dtype, device=DEVICE)
    gemv.gemv(x, weight, out, bias)
    reference_linear.gemv(x, weight, expected, bias)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 64, 65, 128, 129])
def test_a_product_with_its_gate(num_rows: int, dtype: torch.dtype) -> None:
    """A single row, each tile full and nearly empty, and more rows than the kernel is for."""
    x = torch.randn(num_rows, 192, generator=GENERATOR).to(dtype).to(DEVICE)
    weight = (torch.randn(2 * 256, 192, generator=GENERATOR) / 8).to(dtype).to(DEVICE)
    out, expected = (torch.full((num_rows, 256), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    if DEVICE == "cpu" and num_rows <= gemm_gated.MAX_ROWS:
        gemm_gated.multiply(x, weight, out, gemm_gated.launch(num_rows))
    else:
        assert gemm_gated.fits(x, weight) == (DEVICE == "cuda" and num_rows <= gemm_gated.MAX_ROWS)
        gemm_gated.gemm_gated(x, weight, out)
    reference_linear.gemm_gated(x, weight, expected)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_a_gated_product_of_odd_shapes_or_wide_types_is_left_to_torch() -> None:
    x = torch.zeros(8, 192, dtype=torch.bfloat16, device=DEVICE)
    assert not gemm_gated.fits(x, torch.zeros(2 * 192, 192, dtype=torch.bfloat16, device=DEVICE))
    assert not gemm_gated.fits(x[:, :160].contiguous(), torch.zeros(512, 160, dtype=torch.bfloat16, device=DEVICE))
    assert not gemm_gated.fits(x.float(), torch.zeros(512, 192, device=DEVICE))


def test_splits_fill_the_processors_and_no_more() -> None:
    assert gemm_quantized.choose_num_splits(64, 32, 132) == 4
    assert gemm_quantized.choose_num_splits(448, 32, 132) == 1
    assert gemm_quantized.choose_num_splits(16, 9, 132) == 2


def check_product(
    kind: str,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    group: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    splits: int = 0,
) -> None:
    x = torch.randn(num_rows, num_inputs, generator=GENERATOR).to(dtype)
    b = torch.randn(num_outputs, generator=GENERATOR).to(dtype).to(DEVICE) if bias else None
    scales = torch.rand(num_outputs, num_inputs // group, generator=GENERATOR) + 0.5
    x_scales, expected = None, torch.empty(num_rows, num_outputs, dtype=dtype, device=DEVICE)
    if kind == "int4 groups":
        q = torch.randint(-8, 8, (num_outputs, num_inputs), generator=GENERATOR, dtype=torch.int8)
        x, weight, scales = x.to(DEVICE), pack_int4(q).to(DEVICE), scales.half().to(DEVICE)
        reference_linear.gemm_w4(x, weight, scales, group, expected, b)
    elif kind == "fp8 rows":
        weight = torch.randn(num_outputs, num_inputs, generator=GENERATOR).to(FP8).to(DEVICE)
        x, scales = x.to(FP8).to(DEVICE), scales[:, 0].contiguous().to(DEVICE)
        x_scales = (torch.rand(num_rows, generator=GENERATOR) + 0.5).to(DEVICE)
        reference_linear.gemm_fp8(x, x_scales, weight, scales, expected, b)
    else:
        weight = torch.randint(-128, 128, (num_outputs, num_inputs), generator=GENERATOR, dtype=torch.int8).to(DEVICE)
        scales = (scales[:, 0].contiguous() if kind == "int8 rows" else scales).to(DEVICE)
        x = x.to(DEVICE)
        reference_linear.gemm_w8(x, weight, scales, expected, b)
    out = torch.full_like(expected, torch.nan)
    gemm_quantized._multiply(KINDS[kind].value, x, weight, scales, x_scales, out, b, group, splits)
    # Errors of a sum are measured by its terms, not by what is left when they cancel. A single row adds 128 to int4s.
    size = expected.float().square().mean().sqrt()
    tolerance = {torch.float32: 2e-5 if kind == "int4 groups" else 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[
        dtype
    ]
    if kind == "fp8 rows" and DEVICE == "cuda":
        tolerance = max(tolerance, 4e-3)  # tensor cores keep 14 bits of a sum of e4m3
    torch.testing.assert_close(out.float() / size, expected.float() / size, rtol=tolerance, atol=tolerance)
