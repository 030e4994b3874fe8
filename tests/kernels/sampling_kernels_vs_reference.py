"""Tokens chosen by the Triton kernels against the torch reference, as kernels_vs_reference.py does for attention."""

import os

import pytest
import torch
from pagewire_kernels import reference_sampling, sample
from pagewire_kernels.sampling_tensors import IN_PROMPT, SamplingTensors

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("vocabulary", [37, 128, 200])
def test_any_mixture_of_parameters(vocabulary: int, seed: int) -> None:
    """Six rows, each with some of everything, in chunks and lists that end in the middle."""
    torch.manual_seed(100 * seed + vocabulary)
    params = random_params(8, vocabulary)
    logits = 3 * torch.randn(6, vocabulary)
    seats = torch.randint(0, 8, (6,), dtype=torch.int32)
    num_chosen = torch.randint(0, 4, (6,), dtype=torch.int32)
    bitmask = torch.randint(-(2**31), 2**31 - 1, (6, -(-vocabulary // 32)), dtype=torch.int32)
    check(logits, params, seats, torch.rand(6, dtype=torch.float64), num_chosen, bitmask)
    check(logits.half(), params, seats, torch.rand(6), num_chosen, None)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1, 0), (0, 0.6, 0), (7, 0.5, 0), (0, 1, 0.3), (9, 0.9, 0.2)])
def test_ties_at_the_threshold_go_to_the_first_tokens(top_k: int, top_p: float, min_p: float) -> None:
    """Logits of four values, so that every threshold falls among equals; uniforms that meet every token kept."""
    torch.manual_seed(0)
    vocabulary, rows = 40, 12
    row = torch.randint(0, 4, (vocabulary,)).float()
    params = SamplingTensors.neutral(1, vocabulary, "cpu", 1, 1)
    params.temperature[:], params.top_k[:], params.top_p[:], params.min_p[:] = 0.7, top_k, top_p, min_p
    uniforms = torch.arange(rows, dtype=torch.float64) / rows + 0.003
    check(row.expand(rows, vocabulary).contiguous(), params, zeros(rows), uniforms, zeros(rows), None)


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.999999999])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_ranges(uniform: float, top_p: float) -> None:
    """The product of the largest uniform and the total may round to the total; top_p of 0 keeps one token."""
    torch.manual_seed(1)
    vocabulary = 100
    params = SamplingTensors.neutral(4, vocabulary, "cpu", 1, 1)
    params.temperature[:] = torch.tensor([1e-3, 1.0, 50.0, 1.0])
    params.top_p[:3], params.top_k[3] = top_p, 1000
    logits = 4 * torch.randn(4, vocabulary)
    check(logits, params, torch.arange(4), torch.full((4,), uniform, dtype=torch.float64), zeros(4), None)


def test_a_flat_distribution_keeps_more_than_any_fixed_threshold_leaves_out() -> None:
    torch.manual_seed(2)
    vocabulary = 200
    params = SamplingTensors.neutral(3, vocabulary, "cpu", 1, 1)
    params.temperature[:], params.top_p[0], params.top_k[1], params.top_k[2] = 5.0, 0.97, 190, 75
    params.top_p[2] = 0.8
    logits = torch.randn(3, vocabulary)
    check(logits, params, torch.arange(3), torch.rand(3, dtype=torch.float64), zeros(3), None)


def test_parameters_that_all_seats_share_and_padding_rows() -> None:
    """Tensors of stride 0, and a negative seat, whose token is nobody's but must be one."""
    vocabulary = 50
    one = SamplingTensors.neutral(1, vocabulary, "cpu", 1, 1)
    params = SamplingTensors(
        **{name: getattr(one, name).expand(4, *getattr(one, name).shape[1:]) for name in one.__slots__}
    )
    logits = torch.randn(4, vocabulary)
    out = check(logits, params, torch.tensor([0, 3, -1, 2]), torch.zeros(4), zeros(4), None)
    assert torch.equal(out, logits.argmax(-1).to(out.device, out.dtype))


def test_a_row_with_a_logit_that_is_not_a_number_has_no_token() -> None:
    """In any chunk of it, also where it is not allowed; greedy or drawn, whatever is left out."""
    torch.manual_seed(3)
    vocabulary = 100
    params = SamplingTensors.neutral(8, vocabulary, "cpu", 1, 1)
    params.temperature[4:], params.top_k[5], params.top_p[6], params.min_p[7] = 1.0, 3, 0.5, 0.1
    logits = torch.randn(8, vocabulary)
    logits[torch.tensor([0, 2, 4, 5, 6, 7]), torch.tensor([0, 99, 99, 0, 50, 70])] = torch.nan
    logits[2] = torch.nan
    bitmask = torch.zeros(8, 4, dtype=torch.int32)
    bitmask[:, 1] = -1
    for mask in (None, bitmask):
        out = check(logits, params, torch.arange(8), torch.rand(8, dtype=torch.float64), zeros(8), mask)
        assert ((out < 0).cpu() == logits.isnan().any(-1)).all()


def test_a_row_whose_every_token_is_excluded_has_none() -> None:
    vocabulary = 100
    params = SamplingTensors.neutral(10, vocabulary, "cpu", 1, 1)
    params.temperature[5:], params.top_k[6], params.top_p[7], params.min_p[8] = 1.0, 3, 0.5, 0.1
    logits = torch.full((10, vocabulary), -torch.inf)
    logits[torch.tensor([4, 9]), torch.tensor([70, 3])] = torch.inf
    out = check(logits, params, torch.arange(10), torch.rand(10, dtype=torch.float64), zeros(10), None)
    assert (out == -1).all()
    logits = torch.randn(10, vocabulary)
    params.bias_ids[:, 0], params.bias_values[:, 0] = 40, -torch.inf
    bitmask = torch.zeros(10, 4, dtype=torch.int32)
    bitmask[:, 1] = 1 << (40 - 32)
    out = check(logits, params, torch.arange(10), torch.rand(10, dtype=torch.float64), zeros(10), bitmask)
    assert (out == -1).all()


def random_params(seats: int, vocabulary: int) -> SamplingTensors:
    params = SamplingTensors.neutral(seats, vocabulary, "cpu", max_banned=3, max_bias=5)

    def some(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(0, len(values), (seats,))]

    params.temperature[:] = some(0.0, 0.5, 1.0, 1.7)
    params.top_k[:] = some(0, 0, 1, 4, 30).int()
    params.top_p[:] = some(1.0, 1.0, 0.3, 0.9)
    params.min_p[:] = some(0.0, 0.0, 0.05, 0.4)
    params.repetition_penalty[:] = some(1.0, 1.3, 0.8)
    params.presence_penalty[:] = some(0.0, 0.0, 1.5)
    params.frequency_penalty[:] = some(0.0, 0.0, 0.7, -0.5)
    params.min_tokens[:] = some(0, 2, 3).int()
    for seat in range(seats):
        banned, biased = torch.randint(0, 4, ()).item(), torch.randint(0, 6, ()).item()
        params.banned_ids[seat, :banned] = torch.randperm(vocabulary)[:banned].int()
        params.bias_ids[seat, :biased] = torch.randperm(vocabulary)[:biased].int()
        params.bias_values[seat, :biased] = 3 * torch.randn(biased)
    params.counts[:] = torch.randint(0, 3, params.counts.shape) + IN_PROMPT * torch.randint(0, 2, params.counts.shape)
    return params


def check(logits, params, seats, uniforms, num_chosen, bitmask) -> torch.Tensor:
    args = [argument if argument is None else argument.to(DEVICE) for argument in (seats, uniforms, num_chosen)]
    params = SamplingTensors(**{name: getattr(params, name).to(DEVICE) for name in params.__slots__})
    logits = logits.to(DEVICE)
    bitmask = None if bitmask is None else bitmask.to(DEVICE)
    out = torch.full((len(logits),), -3, dtype=torch.int32, device=DEVICE)
    expected = torch.full_like(out, -2)
    before = logits.clone()
    sample.sample_in_chunks(logits, params, *args, out, bitmask, chunk=64, list_block=32)
    reference_sampling.sample(logits, params, *args, expected, bitmask)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    assert out.tolist() == expected.tolist()
    return out


def zeros(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int32)
