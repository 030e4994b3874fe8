"""The Triton kernels against the torch reference: on a GPU where there is one, else under TRITON_INTERPRET=1.

Not collected by name: test_triton.py runs this file in a process of its own, because TRITON_INTERPRET must be set
before anything imports triton. On a GPU machine: pytest tests/kernels/kernels_vs_reference.py
"""

import os

import pytest
import torch
from paged_case import TOLERANCE, PagedCase
from pagewire_kernels import kv_copy, paged_decode, paged_prefill, reference, reference_paged
from pagewire_kernels.decode_workspace import PROGRAMS_PER_PROCESSOR, DecodeWorkspace

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The interpreter turns one-element arrays into scalars, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# heads (H, KVH), head_dim, block_size: groups of 1 to 20, head dims that are no power of two, every block size.
SHAPES = [
    ((4, 2), 16, 8),
    ((6, 2), 32, 16),
    ((3, 3), 64, 32),
    ((8, 1), 80, 64),
    ((9, 3), 96, 16),
    ((20, 1), 128, 16),
    ((2, 1), 256, 8),
]


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("num_runs", [1, 3, 40])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_decode(heads: tuple[int, int], head_dim: int, block_size: int, num_runs: int, window: int) -> None:
    """Lengths around a block and a tile; runs that end inside a sequence, between two, and where nothing is left."""
    check_decode([1, block_size, block_size + 1, 150], heads, head_dim, block_size, torch.float32, num_runs, window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_in_every_dtype(dtype: torch.dtype) -> None:
    for num_runs in (2, 9):
        check_decode([7, 8, 9, 260], (6, 2), 64, 8, dtype, num_runs, 0)


def test_decode_of_one_long_sequence_by_many_programs() -> None:
    """More partial outputs of one head than the second kernel takes at once."""
    check_decode([2600], (2, 1), 16, 16, torch.float32, 20, 0)


def test_decode_of_many_sequences_one_of_them_long_has_no_second_kernel() -> None:
    """More partial outputs of one head than a program adds at once, beside sequences whole and in two parts."""
    lengths = [3] * 12 + [2600] + [40] * 9
    for heads in ((6, 2), (1, 1)):
        check_decode(lengths, heads, 16, 16, torch.float32, 22, 0)


def test_decode_with_a_workspace_of_its_own() -> None:
    check_decode([600, 3], (4, 2), 16, 16, torch.float32, 0, 0)


@pytest.mark.parametrize("num_runs", [1, 2, 6])
def test_decode_of_a_padding_row_is_zero(num_runs: int) -> None:
    """Padding at both ends and in the middle: rows that no program meets."""
    case = on_device(PagedCase.random([5, 20, 3, 30, 7], [1] * 5, heads=(4, 2), block_size=8))
    case.seq_lens[::2] = 0
    args = case.q, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, case.scale, 0
    out = paged_decode.paged_decode(*args, workspace=poisoned_workspace(case, num_runs))
    assert out[::2].eq(0).all()
    torch.testing.assert_close(out, reference.paged_decode(*args), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [0, 40])
def test_attention_over_an_e4m3_cache(window: int) -> None:
    """Scales that differ, so that one in the place of the other shows."""
    case = on_device(PagedCase.random([9, 75, 33], [1, 1, 1], heads=(4, 2), block_size=16, head_dim=32))
    case.k_cache, case.v_cache = (cache.to(torch.float8_e4m3fn) for cache in (case.k_cache, case.v_cache))
    scales = {"k_scale": 0.75, "v_scale": 2.5}
    args = case.q, case.k_cache, case.v_cache, case.block_tables
    decoded = paged_decode.paged_decode(
        *args, case.seq_lens, case.scale, window, **scales, workspace=poisoned_workspace(case, 3)
    )
    prefilled = paged_prefill.paged_prefill(*args, case.cu_seqlens_q, case.seq_lens, case.scale, window, **scales)
    expected = reference_paged.paged_decode(*args, case.seq_lens, case.scale, window, **scales)
    torch.testing.assert_close(decoded, expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(prefilled, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_prefill(heads: tuple[int, int], head_dim: int, block_size: int, window: int) -> None:
    """A whole prompt, a later chunk, a decode row, an idle sequence and a chunk of several tiles, packed."""
    check_prefill([9, 75, 33, 12, 41], [9, 11, 1, 0, 41], heads, head_dim, block_size, torch.float32, window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_every_dtype(dtype: torch.dtype) -> None:
    check_prefill([20, 90], [20, 70], (6, 2), 64, 16, dtype, 0)


def test_prefill_window_that_hides_whole_tiles_from_the_last_rows() -> None:
    """A window of 3 in a tile of 32 rows: most rows see nothing of most key tiles."""
    check_prefill([100], [100], (2, 2), 16, 8, torch.float32, 3)


def test_prefill_of_one_row_agrees_with_decode() -> None:
    case = on_device(PagedCase.random([33, 5], [1, 1], heads=(4, 2), block_size=16))
    args = case.q, case.k_cache, case.v_cache, case.block_tables
    by_prefill = paged_prefill.paged_prefill(*args, case.cu_seqlens_q, case.seq_lens, case.scale)
    by_decode = paged_decode.paged_decode(*args, case.seq_lens, case.scale)
    torch.testing.assert_close(by_prefill, by_decode, **TOLERANCE[torch.float32])


def test_queries_and_caches_may_be_views_with_an_outer_stride() -> None:
    """q as a slice of a fused qkv projection, K and V as the halves of one buffer [num_blocks, 2, ...]."""
    case = on_device(PagedCase.random([20, 9], [7, 9], heads=(4, 2), block_size=8))
    expected = reference_prefill(case, 0)
    both = torch.stack((case.k_cache, case.v_cache), dim=1)
    qkv = torch.cat((case.q, torch.zeros_like(case.q)), dim=1)
    case.q, case.k_cache, case.v_cache = qkv[:, :4], both[:, 0], both[:, 1]
    out = paged_prefill.paged_prefill(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.cu_seqlens_q, case.seq_lens, case.scale
    )
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


def test_a_cache_that_is_strided_inside_a_block_is_refused() -> None:
    case = on_device(PagedCase.random([20], [1], heads=(4, 2), block_size=8))
    by_head = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="a block of k_cache must be contiguous"):
        paged_decode.paged_decode(case.q, by_head, case.v_cache, case.block_tables, case.seq_lens, case.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 80), (9, 128)])
def test_write_kv_is_bit_exact(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Rows of 240 elements leave lanes idle, rows of 1152 take two programs."""
    row = num_kv_heads * head_dim
    fused = torch.randn(11, 3 * row, device=DEVICE).to(dtype)
    k = fused[:, row : 2 * row].view(11, num_kv_heads, head_dim)
    v = torch.randn(11, num_kv_heads, head_dim, device=DEVICE).to(dtype)
    slots = torch.randperm(6 * 8, device=DEVICE)[:11]
    # A gap after every block of keys, none after those of values.
    k_caches = [torch.zeros(6, 2, 8, num_kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    v_caches = [torch.zeros(6, 8, num_kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    kv_copy.write_kv(k, v, k_caches[0][:, 1], v_caches[0], slots)
    reference.write_kv(k, v, k_caches[1][:, 1], v_caches[1], slots)
    assert torch.equal(*k_caches)
    assert torch.equal(*v_caches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack_are_bit_exact(dtype: torch.dtype) -> None:
    sent = torch.randn(3, 2, 5, 8, 3, 16, device=DEVICE).to(dtype)
    slots = torch.randperm(5 * 8, device=DEVICE)[:21]
    wire = kv_copy.pack_kv(sent, slots, (1, 3))
    assert torch.equal(wire, reference.pack_kv(sent, slots, (1, 3)))
    received = [torch.zeros(3, 2, 3, 16, 3, 16, dtype=dtype, device=DEVICE) for _ in range(2)]
    new_slots = torch.randperm(3 * 16, device=DEVICE)[:21]
    kv_copy.unpack_kv(wire, received[0], new_slots, (1, 3))
    reference.unpack_kv(wire, received[1], new_slots, (1, 3))
    assert torch.equal(*received)
    assert received[0][0].eq(0).all()


def test_nothing_to_do_is_no_launch() -> None:
    cache = torch.zeros(1, 2, 2, 8, 1, 16, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kv_copy.pack_kv(cache, none, (0, 1)).shape == (1, 2, 0, 1, 16)
    kv_copy.write_kv(cache[0, 0, 0, :0], cache[0, 0, 0, :0], cache[0, 0], cache[0, 1], none)


def check_decode(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    num_runs: int,
    window: int,
) -> None:
    case = on_device(
        PagedCase.random(
            lengths, [1] * len(lengths), heads=heads, block_size=block_size, head_dim=head_dim, dtype=dtype
        )
    )
    args = case.q, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, case.scale, window
    workspace = poisoned_workspace(case, num_runs) if num_runs else None
    out = paged_decode.paged_decode(*args, workspace=workspace)
    assert out.dtype == dtype
    if workspace:  # is as it was, for the layers that follow
        assert workspace.arrived.eq(0).all()
        torch.testing.assert_close(paged_decode.paged_decode(*args, workspace=workspace), out, rtol=0, atol=0)
    torch.testing.assert_close(out, reference.paged_decode(*args), **TOLERANCE[dtype])


def check_prefill(
    lengths: list[int],
    chunks: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int,
) -> None:
    case = on_device(
        PagedCase.random(lengths, chunks, heads=heads, block_size=block_size, head_dim=head_dim, dtype=dtype)
    )
    out = paged_prefill.paged_prefill(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        case.scale,
        window,
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference_prefill(case, window), **TOLERANCE[dtype])


def poisoned_workspace(case: PagedCase, num_runs: int) -> DecodeWorkspace:
    """NaN wherever no program writes."""
    num_heads, head_dim = case.q.shape[1:]
    num_kv_heads = case.k_cache.shape[2]
    group = num_heads // num_kv_heads
    resident = paged_decode.resident_programs(head_dim, case.q.element_size(), group)
    programs = num_runs * num_kv_heads * PROGRAMS_PER_PROCESSOR // resident
    partial = torch.full((programs, 2, group, head_dim), torch.nan, device=DEVICE)
    arrived = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
    return DecodeWorkspace(partial, partial[..., 0].contiguous(), arrived)


def reference_prefill(case: PagedCase, window: int) -> torch.Tensor:
    return reference.paged_prefill(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        case.scale,
        window,
    )


def on_device(case: PagedCase) -> PagedCase:
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(DEVICE))
    return case
