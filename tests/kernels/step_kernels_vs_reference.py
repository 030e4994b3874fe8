"""The kernels between matrix products against the torch reference, as kernels_vs_reference.py does for attention."""

import os

import pytest
import torch
from pagewire_kernels import activation, norm, reference_step, rope_kv, token_ids

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = torch.float8_e4m3fn
GENERATOR = torch.Generator().manual_seed(0)
# One rounding of the dtype: sums in another order may fall on the other side of it. The interpreter cuts bf16 off
# instead of rounding it, several times in a row.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-2 if DEVICE == "cpu" else 1e-2},
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 100, 576])
def test_norm_with_residual(width: int, dtype: torch.dtype, add: bool) -> None:
    x, residual, weight = (random(*shape).to(dtype) for shape in ((3, width), (3, width), (width,)))
    residuals, outs = [residual.clone(), residual.clone()], [torch.empty_like(x), torch.empty_like(x)]
    added = x if add else None
    norm.rms_norm_residual(added, residuals[0], weight, 1e-5, outs[0])
    reference_step.rms_norm_residual(added, residuals[1], weight, 1e-5, outs[1])
    torch.testing.assert_close(*residuals, **TOLERANCE[dtype])
    assert torch.equal(residuals[0], residual) != add
    torch.testing.assert_close(*outs, **TOLERANCE[dtype])


def test_norm_of_an_fp32_residual_beside_bf16_activations() -> None:
    x, weight = random(2, 48).bfloat16(), random(48).bfloat16()
    residual = random(2, 48)
    residuals = [residual.clone(), residual.clone()]
    outs = [torch.empty_like(x), torch.empty_like(x)]
    norm.rms_norm_residual(x, residuals[0], weight, 1e-6, outs[0])
    reference_step.rms_norm_residual(x, residuals[1], weight, 1e-6, outs[1])
    assert torch.equal(*residuals)
    torch.testing.assert_close(*outs, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 1500])
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    """1500 columns take two programs a row."""
    gate_up = (4 * random(3, 2 * width)).to(dtype)
    outs = [torch.empty(3, width, dtype=dtype, device=DEVICE) for _ in range(2)]
    activation.silu_and_mul(gate_up, outs[0])
    reference_step.silu_and_mul(gate_up, outs[1])
    torch.testing.assert_close(*outs, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 100])
def test_quantized_rows(width: int, dtype: torch.dtype) -> None:
    """Rows of very different size, one of zeros, one with a power of two as its largest value."""
    x = random(5, width) * torch.tensor([1e-3, 1.0, 300.0, 0.0, 1.0], device=DEVICE)[:, None]
    x[4, 3] = 4.0
    x = x.to(dtype)
    check_quantized(
        lambda out, scales: activation.quantize_fp8_rows(x, out, scales),
        lambda out, scales: reference_step.quantize_fp8_rows(x, out, scales),
        (5, width),
        exact=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_activation_that_quantize(dtype: torch.dtype) -> None:
    x, residual, weight = random(4, 90).to(dtype), random(4, 90).to(dtype), random(90).to(dtype)
    gate_up = (3 * random(4, 2 * 90)).to(dtype)
    check_quantized(
        lambda out, scales: norm.rms_norm_residual_fp8(x, residual.clone(), weight, 1e-5, out, scales),
        lambda out, scales: reference_step.rms_norm_residual_fp8(x, residual.clone(), weight, 1e-5, out, scales),
        (4, 90),
        exact=False,
    )
    check_quantized(
        lambda out, scales: activation.silu_and_mul_fp8(gate_up, out, scales),
        lambda out, scales: reference_step.silu_and_mul_fp8(gate_up, out, scales),
        (4, 90),
        exact=False,
    )


# (H, KVH), head_dim: groups that leave lanes idle, head dims that are no power of two, several programs a token.
HEADS = [((4, 2), 16), ((9, 3), 64), ((7, 1), 80), ((5, 5), 96), ((2, 1), 256)]


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_rope_and_kv_write(heads: tuple[int, int], head_dim: int, with_norm: bool) -> None:
    check_rope(heads, head_dim, torch.float32, torch.float32, with_norm, torch.int64)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_kv_write_in_every_dtype(dtype: torch.dtype, with_norm: bool) -> None:
    check_rope((6, 2), 32, dtype, dtype, with_norm, torch.int32)
    check_rope((6, 2), 32, dtype, FP8, with_norm, torch.int32)


def test_negative_ids_become_the_tokens_of_the_step_before() -> None:
    """Rows 0 and the last, twice the same, and more ids than one program takes."""
    previous = torch.randint(1000, 2000, (300,), device=DEVICE, dtype=torch.int32)
    ids = torch.arange(700, device=DEVICE, dtype=torch.int32)
    ids[::7] = -1 - torch.arange(100, device=DEVICE, dtype=torch.int32) * 2
    ids[1], ids[2], ids[699], previous[4] = -1, -300, -300, -1
    both = [ids.clone(), ids.clone()]
    token_ids.resolve_input_ids(both[0], previous)
    reference_step.resolve_input_ids(both[1], previous)
    assert torch.equal(*both)
    assert both[0][1] == previous[0] and both[0][699] == previous[299]
    assert ids[14] == -5 and both[0][14] == 0, "a row that had no token"


def test_tokens_are_counted_where_a_seat_is_real() -> None:
    counts = torch.zeros(4, 20, dtype=torch.int32, device=DEVICE)
    seats = torch.tensor([2, -1, 0, 2, 2], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([5, 7, 19, 5, 0], dtype=torch.int32, device=DEVICE)
    token_ids.count_tokens(counts, seats, tokens)
    expected = torch.zeros_like(counts)
    expected[2, 5], expected[2, 0], expected[0, 19] = 2, 1, 1
    assert torch.equal(counts, expected)


def check_quantized(run, expect, shape: tuple[int, int], *, exact: bool) -> None:
    outs = [torch.zeros(shape, dtype=FP8, device=DEVICE) for _ in range(2)]
    scales = [torch.full(shape[:1], -1.0, device=DEVICE) for _ in range(2)]
    run(outs[0], scales[0])
    expect(outs[1], scales[1])
    torch.testing.assert_close(*scales, rtol=1e-6 if exact else 2e-2, atol=0)
    values = [out.float() * scale[:, None] for out, scale in zip(outs, scales, strict=True)]
    # A value may sit on the other side of a rounding boundary, an eighth of it apart.
    torch.testing.assert_close(*values, rtol=0 if exact else 0.13, atol=0 if exact else 8e-2)


def check_rope(
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    with_norm: bool,
    integer: torch.dtype,
) -> None:
    """Seven rows, two of them padding, one of those the first; caches with a gap after every block of keys."""
    num_heads, num_kv_heads = heads
    wide = random(7, (num_heads + 2 * num_kv_heads) * head_dim + 16).to(dtype)
    qkv = wide[:, :-16]
    positions = torch.tensor([0, 3, 39, 1, 0, 17, 5], dtype=integer, device=DEVICE)
    slots = torch.tensor([-1, 12, 0, 31, -1, 8, 7], dtype=integer, device=DEVICE)
    angles = random(40, head_dim // 2) * 3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    norms = [1 + 0.2 * random(head_dim).to(dtype) if with_norm else None for _ in range(2)]
    results = []
    for write in (rope_kv.rope_write_kv, reference_step.rope_write_kv):
        q_out = torch.zeros(7, num_heads, head_dim, dtype=dtype, device=DEVICE)
        both = torch.zeros(4, 2, 8, num_kv_heads, head_dim, dtype=cache_dtype, device=DEVICE)
        values = torch.zeros(4, 8, num_kv_heads, head_dim, dtype=cache_dtype, device=DEVICE)
        write(qkv, positions, cos_sin, *norms, 1e-5, q_out, both[:, 0], values, slots, 0.5, 0.25)
        results.append((q_out, both, values))
    tolerance = {"rtol": 0.13, "atol": 4e-3} if cache_dtype == FP8 else TOLERANCE[dtype]
    for name, out, expected in zip(("q", "keys", "values"), *results, strict=True):
        bound = TOLERANCE[dtype] if name == "q" else tolerance
        torch.testing.assert_close(
            out.float(), expected.float(), **bound, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert results[0][1].float().ne(0).any((2, 3, 4))[:, 1].eq(0).all()  # nothing in the gap
    assert results[0][2].float().flatten(0, 1).ne(0).any((1, 2)).nonzero().flatten().tolist() == [0, 7, 8, 12, 31]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(DEVICE)
