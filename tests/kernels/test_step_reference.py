"""The plain torch of a step: against definitions, and traced with shapes alone as a captured graph would see it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pagewire_engine import sampler
from pagewire_engine.sampling_params import SamplingParams
from pagewire_kernels import ops
from pagewire_kernels.int4 import pack_int4, unpack_int4
from torch._subclasses.fake_tensor import FakeTensorMode

FP8 = torch.float8_e4m3fn


@given(rows=st.integers(1, 3), runs=st.integers(1, 4), seed=st.integers(0, 99))
def test_int4_survives_packing(rows: int, runs: int, seed: int) -> None:
    q = torch.randint(-8, 8, (rows, 32 * runs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(q)
    assert packed.shape == (rows, 16 * runs)
    assert torch.equal(unpack_int4(packed), q)


def test_int4_of_a_length_that_leaves_a_run_open_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_int4(torch.zeros(2, 48, dtype=torch.int8))


def test_rope_pairs_the_halves_and_padding_rows_write_nothing() -> None:
    """A padding row once redirected its write to slot 0, over the token that was there."""
    torch.manual_seed(0)
    heads, kv_heads, dim = 2, 1, 4
    qkv = torch.randn(3, (heads + 2 * kv_heads) * dim)
    cos_sin = torch.cat((torch.tensor([[1.0, 0.0]] * 8), torch.tensor([[0.0, 1.0]] * 8)), dim=1)
    q_out = torch.empty(3, heads, dim)
    k_cache, v_cache = torch.full((2, 4, kv_heads, dim), 7.0), torch.full((2, 4, kv_heads, dim), 7.0)
    ops.rope_write_kv(
        qkv, torch.zeros(3, dtype=torch.int64), cos_sin, None, None, 0.0, q_out, k_cache, v_cache,
        torch.tensor([-1, 0, -1]),
    )  # fmt: skip
    # Angle 0 for the first pair, a quarter turn for the second: (x1, x3) -> (-x3, x1).
    q = qkv[:, : heads * dim].view(3, heads, dim)
    assert torch.equal(q_out, torch.stack((q[..., 0], -q[..., 3], q[..., 2], q[..., 1]), dim=-1))
    assert torch.equal(v_cache[0, 0, 0], qkv[1, -dim:])
    assert v_cache.flatten()[dim:].eq(7).all() and k_cache.flatten()[dim:].eq(7).all()


def test_padding_rows_alone_leave_slot_0_as_it_is() -> None:
    cache = torch.full((1, 4, 1, 4), 3.0)
    ops.rope_write_kv(
        torch.randn(2, 12), torch.zeros(2, dtype=torch.int32), torch.ones(1, 4), None, None, 0.0,
        torch.empty(2, 1, 4), cache, cache.clone(), torch.tensor([-1, -1], dtype=torch.int32),
    )  # fmt: skip
    assert cache.eq(3).all()


def test_values_beyond_the_range_of_e4m3_saturate() -> None:
    caches = [torch.zeros(1, 2, 1, 4, dtype=FP8) for _ in range(2)]
    qkv = torch.tensor([[1.0] * 4 + [1e4, -1e4, 2.0, 0.0] + [300.0, -600.0, 1.0, 0.0]])
    cos_sin = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    ops.rope_write_kv(qkv, zero, cos_sin, None, None, 0.0, torch.empty(1, 1, 4), *caches, zero, 2.0, 1.0)
    assert caches[0][0, 0, 0].float().tolist() == [448.0, -448.0, 1.0, 0.0]
    assert caches[1][0, 0, 0].float().tolist() == [288.0, -448.0, 1.0, 0.0]  # 300 lies halfway, and 288 is even


def test_decode_with_a_workspace_is_the_same_attention() -> None:
    """The form that reads no length back, over tables that are wider than any sequence needs."""
    torch.manual_seed(0)
    q, tables = torch.randn(3, 4, 8), torch.tensor([[3, 1, 0, 0], [2, 4, 5, 0], [0, 0, 0, 0]], dtype=torch.int32)
    caches = [torch.randn(6, 4, 2, 8) for _ in range(2)]
    for cache in caches:
        cache[0], cache[1, 2:], cache[5, 1:] = torch.nan, torch.nan, torch.nan
    lengths = torch.tensor([6, 9, 0], dtype=torch.int32)
    workspace = ops.decode_workspace(4, 2, 8, torch.device("cpu"))
    for window in (0, 3):
        args = (q, *caches, tables, lengths, 0.4, window)
        torch.testing.assert_close(ops.paged_decode(*args, workspace=workspace), ops.paged_decode(*args))


def test_a_decode_step_can_be_traced_with_shapes_alone() -> None:
    """Nothing may read a value back or size a tensor by one: FakeTensorMode has no values and raises."""
    with FakeTensorMode():
        rows, heads, kv_heads, dim, hidden = 3, 4, 2, 8, 32
        residual, out = torch.randn(rows, hidden), torch.empty(rows, hidden)
        ids = torch.zeros(rows, dtype=torch.int32)
        ops.resolve_input_ids(ids, ids.clone())
        ops.rms_norm_residual(torch.randn(rows, hidden), residual, torch.ones(hidden), 1e-5, out)
        quantized, scales = torch.empty(rows, hidden, dtype=FP8), torch.empty(rows)
        ops.rms_norm_residual_fp8(None, residual, torch.ones(hidden), 1e-5, quantized, scales)
        q_out = torch.empty(rows, heads, dim)
        caches = [torch.zeros(6, 4, kv_heads, dim) for _ in range(2)]
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
        ops.rope_write_kv(qkv, ids, torch.zeros(9, dim), None, None, 1e-5, q_out, *caches, ids.long())
        tables = torch.zeros(rows, 2, dtype=torch.int32)
        workspace = ops.decode_workspace(heads, kv_heads, dim, torch.device("cpu"))
        ops.paged_decode(q_out, *caches, tables, ids, 0.3, out=torch.empty_like(q_out), workspace=workspace)
        ops.gemm_w4(out, torch.zeros(16, 16, dtype=torch.uint8), torch.ones(16, 1).half(), 32, torch.empty(rows, 16))
        params = ops.SamplingTensors.neutral(rows, 50, "cpu")
        ops.sample(
            torch.randn(rows, 50), params, ids, scales, ids, ids.clone(), torch.zeros(rows, 2, dtype=torch.int32)
        )
        ops.count_tokens(params.counts, ids, ids)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_chosen_on_the_device_are_those_the_host_chooses(seed: int) -> None:
    """The same logits, parameters and uniforms through the engine's sampler and through ops.sample."""
    rng = torch.Generator().manual_seed(seed)
    vocabulary, num_rows = 61, 9

    def pick(*values: float) -> float:
        return values[int(torch.randint(0, len(values), (), generator=rng))]

    logits = 3 * torch.randn(num_rows, vocabulary, generator=rng)
    params = ops.SamplingTensors.neutral(num_rows, vocabulary, "cpu", max_banned=4, max_bias=4)
    rows, uniforms, num_chosen = [], torch.empty(num_rows, dtype=torch.float64), torch.empty(num_rows).int()
    for r in range(num_rows):
        given = SamplingParams(
            seed=seed,
            temperature=pick(0.0, 0.6, 1.0),
            top_k=int(pick(0, 0, 3, 20)),
            top_p=pick(1.0, 0.4, 0.95),
            min_p=pick(0.0, 0.1),
            repetition_penalty=pick(1.0, 1.2),
            presence_penalty=pick(0.0, 0.5),
            frequency_penalty=pick(0.0, 0.3),
            min_tokens=int(pick(0, 5)),
            stop_token_ids=frozenset({4, 9}),
            eos_token_ids=frozenset({2}),
            logit_bias={7: 2.0, 11: -1.0} if pick(0, 1) else {},
        )
        tokens = torch.randint(0, vocabulary, (12,), generator=rng).tolist()
        rows.append(sampler.SampleRow(given, 0, tokens, 8))
        uniforms[r], num_chosen[r] = sampler.uniform(seed, 0, len(tokens)), 4
        fill_seat(params, r, given, tokens[:8], tokens[8:])
    chosen = torch.empty(num_rows, dtype=torch.int32)
    ops.sample(logits, params, torch.arange(num_rows), uniforms, num_chosen, chosen)
    assert chosen.tolist() == [sampled.token for sampled in sampler.sample(logits.clone(), rows)]


def fill_seat(
    params: ops.SamplingTensors, seat: int, given: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    plain = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in (*plain, "min_tokens"):
        getattr(params, name)[seat] = getattr(given, name)
    banned = sorted(given.banned_before_min_tokens)
    params.banned_ids[seat, : len(banned)] = torch.tensor(banned, dtype=torch.int32)
    for i, (token, value) in enumerate(given.logit_bias.items()):
        params.bias_ids[seat, i], params.bias_values[seat, i] = token, value
    params.counts[seat] = torch.tensor(output).bincount(minlength=params.counts.shape[1])
    params.counts[seat, torch.tensor(prompt).unique()] += ops.IN_PROMPT
