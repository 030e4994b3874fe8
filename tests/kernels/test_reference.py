"""The torch path against a dense fp64 implementation that shares no code with it, over a cache full of NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import TOLERANCE, PagedCase, dense_attention
from pagewire_kernels import ops, reference

HEADS = [(4, 2), (6, 2), (3, 3), (8, 1)]
BLOCK_SIZE = 8
EDGE_LENGTHS = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE + 3]


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[n] for n in EDGE_LENGTHS] + [EDGE_LENGTHS, [70, 66, 68], [200, 3, 190, 4]])
def test_decode_matches_dense_attention_whatever_lengths_share_a_batch(
    lengths: list[int], heads: tuple[int, int], window: int
) -> None:
    """Lists of one take the single-sequence path, similar lengths one padded gather, the last two groups."""
    case = PagedCase.random(lengths, [1] * len(lengths), heads=heads, block_size=BLOCK_SIZE)
    out = ops.paged_decode(case.q, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, case.scale, window)
    assert_dense(out, case, window)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_matches_dense_attention_for_mixed_chunks(heads: tuple[int, int], window: int) -> None:
    """Whole prompts, later chunks, decode rows and an idle sequence in one packed batch."""
    lengths = [1, 7, 8, 9, 40, 43, 30, 12]
    chunks = [1, 7, 8, 2, 40, 11, 1, 0]
    case = PagedCase.random(lengths, chunks, heads=heads, block_size=BLOCK_SIZE)
    assert_dense(prefill(case, window), case, window)


def test_prefill_of_a_long_chunk_is_the_same_across_row_tiles() -> None:
    case = PagedCase.random([300], [290], heads=(4, 2), block_size=16)
    for window in (0, 100):
        assert_dense(prefill(case, window), case, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_at_the_end(dtype: torch.dtype) -> None:
    """Scores and sums are fp32: the error is the rounding of the output, not of a half-precision softmax."""
    case = PagedCase.random([33, 20], [5, 20], heads=(6, 2), block_size=16, dtype=dtype)
    out = prefill(case, 0)
    assert out.dtype == dtype
    assert_dense(out, case, 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mix_of_lengths_matches_dense_attention(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5), label="lengths")
    chunks = [data.draw(st.integers(0, n), label="chunk") for n in lengths]
    case = PagedCase.random(
        lengths,
        chunks,
        heads=data.draw(st.sampled_from(HEADS), label="heads"),
        block_size=data.draw(st.sampled_from([8, 16, 32]), label="block_size"),
        head_dim=data.draw(st.sampled_from([16, 80]), label="head_dim"),
    )
    window = data.draw(st.sampled_from([0, 1, 17]), label="window")
    assert_dense(prefill(case, window), case, window)


def test_padding_rows_of_a_decode_batch_give_zeros() -> None:
    case = PagedCase.random([9, 20], [1, 1], heads=(4, 2), block_size=BLOCK_SIZE)
    seq_lens = case.seq_lens.clone()
    seq_lens[1] = 0
    out = ops.paged_decode(case.q, case.k_cache, case.v_cache, case.block_tables, seq_lens, case.scale)
    assert out[1].eq(0).all()
    torch.testing.assert_close(out[0].double(), dense_attention(case, 0)[0], **TOLERANCE[torch.float32])


def test_a_leaked_key_is_noticed() -> None:
    """The poison is worth nothing if an off-by-one would pass: one position too many must turn the output into NaN."""
    case = PagedCase.random([9, 20], [1, 1], heads=(4, 2), block_size=BLOCK_SIZE)
    out = ops.paged_decode(case.q, case.k_cache, case.v_cache, case.block_tables, case.seq_lens + 1, case.scale)
    assert out.isnan().all()


def test_write_kv_touches_its_slots_and_no_others() -> None:
    for interleaved in (False, True):
        k_cache, v_cache = empty_caches(interleaved)
        k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
        slots = torch.tensor([17, 0, 8])
        ops.write_kv(k, v, k_cache, v_cache, slots)
        for rows, cache in ((k, k_cache), (v, v_cache)):
            flat = cache.reshape(-1, 2, 16)
            assert torch.equal(flat[slots], rows)
            assert flat.isnan().all(-1).all(-1).sum() == 4 * 8 - 3


def test_caches_whose_blocks_are_spread_out_give_the_same_attention() -> None:
    """One buffer [num_blocks, 2, ...] makes K and V views with a gap after every block."""
    case = PagedCase.random([30, 17], [9, 1], heads=(4, 2), block_size=BLOCK_SIZE)
    expected = prefill(case, 0)
    both = torch.stack((case.k_cache, case.v_cache), dim=1)
    case.k_cache, case.v_cache = both[:, 0], both[:, 1]
    assert not case.k_cache.is_contiguous()
    assert torch.equal(prefill(case, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_kv_survives_a_change_of_block_size_bit_for_bit(dtype: torch.dtype) -> None:
    """The sender has blocks of 8, the receiver of 16 scattered elsewhere; NaN payloads must travel unchanged too."""
    sender = torch.randn(4, 2, 6, 8, 2, 16).to(dtype)
    sender[1, 0, 3, 5] = math.nan
    receiver = torch.zeros(4, 2, 5, 16, 2, 16, dtype=dtype)
    # The token of NaNs is among those sent, at slot 3 * 8 + 5.
    others = torch.randperm(6 * 8 - 1)[:28]
    sent_from = torch.cat((torch.tensor([29]), torch.where(others < 29, others, others + 1)))
    received_at = torch.randperm(5 * 16)[:29]
    wire = ops.pack_kv(sender, sent_from, (1, 4))
    assert wire.shape == (3, 2, 29, 2, 16)
    assert wire.is_contiguous()
    ops.unpack_kv(wire, receiver, received_at, (1, 4))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for there, here in zip(sent_from.tolist(), received_at.tolist(), strict=True):
        sent = sender[1:4, :, there // 8, there % 8]
        received = receiver[1:4, :, here // 16, here % 16]
        assert torch.equal(received.view(bits), sent.view(bits))
    assert receiver[0].eq(0).all()
    assert receiver.view(bits).ne(0).any(-1).any(-1).sum() == 3 * 2 * 29


def test_packing_a_cache_whose_layers_are_spread_out_gathers_the_same_tokens() -> None:
    """Blocks outermost, [num_blocks, L, 2, ...]: the copy must not flatten, which would duplicate the whole cache."""
    by_block = torch.randn(6, 4, 2, 8, 2, 16)
    cache = by_block.permute(1, 2, 0, 3, 4, 5)
    slots = torch.randperm(6 * 8)[:13]
    wire = ops.pack_kv(cache, slots, (1, 3))
    assert torch.equal(wire, ops.pack_kv(cache.contiguous(), slots, (1, 3)))
    by_block.zero_()
    ops.unpack_kv(wire, cache, slots, (1, 3))
    assert torch.equal(ops.pack_kv(cache, slots, (1, 3)), wire)


def test_rms_norm_casts_before_the_weight_like_llama() -> None:
    """In bf16 the order is visible: normalise in fp32, round, then multiply in bf16."""
    x, weight = torch.randn(5, 48).bfloat16(), torch.rand(48).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    rounded = exact.float().bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), weight * rounded)


def test_rope_is_bit_equal_to_the_hugging_face_formula() -> None:
    q, k = torch.randn(7, 4, 16), torch.randn(7, 2, 16)
    angles = torch.arange(7.0).unsqueeze(1) * 10000 ** (-torch.arange(0, 16, 2) / 16)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    for x, rotated in zip((q, k), ops.rope(q, k, cos, sin), strict=True):
        rotate_half = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
        assert torch.equal(rotated, x * cos.unsqueeze(1) + rotate_half * sin.unsqueeze(1))
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_silu_and_mul_gates_the_second_half_with_the_first() -> None:
    gate_up = torch.randn(3, 10, dtype=torch.float64)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(ops.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)


def test_a_wrong_argument_is_a_value_error_that_names_it() -> None:
    case = PagedCase.random([9], [1], heads=(4, 2), block_size=BLOCK_SIZE)
    caches = (case.k_cache, case.v_cache)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 kv heads"):
        ops.paged_decode(case.q[:, :3], *caches, case.block_tables, case.seq_lens, 1.0)
    with pytest.raises(ValueError, match="block_tables must be int32"):
        ops.paged_decode(case.q, *caches, case.block_tables.long(), case.seq_lens, 1.0)
    with pytest.raises(ValueError, match=r"q torch\.float64, k_cache torch\.float32"):
        ops.paged_decode(case.q.double(), *caches, case.block_tables, case.seq_lens, 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be int32 or int64 \[2\]"):
        ops.paged_prefill(case.q, *caches, case.block_tables, torch.tensor([0]), case.seq_lens, 1.0)
    with pytest.raises(ValueError, match="slot_mapping has 2 entries for 1 tokens"):
        ops.write_kv(case.q[:, :2], case.q[:, :2], *caches, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="layers"):
        ops.pack_kv(torch.zeros(2, 2, 4, 8, 2, 16), torch.tensor([0]), (1, 3))


def test_a_cpu_tensor_gets_the_reference() -> None:
    assert ops.implementation("cpu").write_kv is reference.write_kv


def assert_dense(out: torch.Tensor, case: PagedCase, window: int) -> None:
    torch.testing.assert_close(out.double(), dense_attention(case, window), **TOLERANCE[out.dtype])


def prefill(case: PagedCase, window: int) -> torch.Tensor:
    return ops.paged_prefill(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.cu_seqlens_q,
        case.seq_lens,
        case.scale,
        window,
    )


def empty_caches(interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Four poisoned blocks of 8 slots, either as two buffers or as one whose blocks alternate K and V."""
    if interleaved:
        both = torch.full((4, 2, 8, 2, 16), math.nan)
        return both[:, 0], both[:, 1]
    return torch.full((4, 8, 2, 16), math.nan), torch.full((4, 8, 2, 16), math.nan)
