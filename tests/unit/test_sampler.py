"""Sampling: exact distributions, and randomness that only (seed, choice, position) decide."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire.v1 import common_pb2 as pb
from pagewire_engine import sampler
from pagewire_engine.sampler import SampleRow, sample, uniform
from pagewire_engine.sampling_params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def row(tokens: list[int] | None = None, num_prompt: int = 0, choice: int = 0, **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(**params), choice, tokens or [], num_prompt)


def draw(count: int, **params: Any) -> Counter[int]:
    """Tokens at `count` positions; the prefix is there only for its length."""
    rows = [row([0] * i, i, seed=7, **params) for i in range(count)]
    return Counter(s.token for s in sample(LOGITS.repeat(count, 1), rows))


def assert_distribution(counts: Counter[int], expected: torch.Tensor) -> None:
    total = sum(counts.values())
    for token, p in enumerate(expected.tolist()):
        sigma = (p * (1 - p) / total) ** 0.5
        assert abs(counts[token] / total - p) <= 5 * sigma + 1e-12, f"token {token}: {counts[token] / total} for {p}"


def test_plain_sampling_follows_the_softmax() -> None:
    assert_distribution(draw(4000), LOGITS.softmax(-1))


def test_temperature_scales_the_logits() -> None:
    assert_distribution(draw(4000, temperature=0.5), (LOGITS / 0.5).softmax(-1))


def test_top_k_keeps_the_k_best() -> None:
    assert_distribution(draw(3000, top_k=2), torch.cat([LOGITS[:2].softmax(-1), torch.zeros(4)]))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probs = LOGITS.softmax(-1)
    kept = int((probs.cumsum(-1) < 0.8).sum()) + 1
    assert_distribution(draw(3000, top_p=0.8), torch.cat([LOGITS[:kept].softmax(-1), torch.zeros(6 - kept)]))


def test_a_tiny_top_p_still_keeps_the_best_token() -> None:
    assert set(draw(50, top_p=1e-6)) == {0}


def test_min_p_is_relative_to_the_best_token() -> None:
    probs = LOGITS.softmax(-1)
    kept = probs >= 0.2 * probs.max()
    assert_distribution(draw(3000, min_p=0.2), torch.where(kept, probs, 0) / probs[kept].sum())


def test_min_p_of_one_keeps_the_best() -> None:
    rows = [row([0] * i, i, seed=7, min_p=1.0) for i in range(50)]
    assert {s.token for s in sample(LOGITS.flip(0).repeat(50, 1), rows)} == {5}


def test_top_p_is_of_what_top_k_has_left() -> None:
    """Of 0.4 and 0.3 the first alone has more than 0.55."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    for options, kept in (({"top_k": 2, "top_p": 0.55}, {0}), ({"top_k": 2, "top_p": 0.6}, {0, 1})):
        rows = [row([0] * i, i, seed=3, **options) for i in range(50)]
        assert {s.token for s in sample(logits.repeat(50, 1), rows)} == kept


def test_a_set_that_is_exactly_top_p_needs_no_more() -> None:
    rows = [row([0] * i, i, seed=3, top_p=0.5) for i in range(50)]
    assert {s.token for s in sample(torch.tensor([0.0, 0.0]).repeat(50, 1), rows)} == {0}


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1.0, 2)])
def test_at_the_ends_of_the_distribution_is_a_token_that_is_possible(
    number: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greatest number below one, times what the probabilities add up to, may be rounded to that."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, choice, position: number)
    logits = torch.tensor([[-3.0, 1.0, 1.0, -3.0]])
    assert sample(logits, [row(top_k=2)])[0].token == token


def test_a_number_just_below_a_tokens_end_draws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its 53 bits count: other ways to compute a step would draw another token."""
    monkeypatch.setattr(sampler, "uniform", lambda *_: 0.5 - 2**-40)
    assert [s.token for s in sample(torch.zeros(1, 2), [row()])] == [0]


def test_typical_p_keeps_what_surprises_as_much_as_is_expected() -> None:
    """By hand: the entropy is 1.75 bits, and the tokens' surprise 1, 2, 3 and 3 bits: 1 first, then 0, then 2 and 3."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for typical_p, kept in ((0.2, {1}), (0.3, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        rows = [row([0] * i, i, seed=3, typical_p=typical_p) for i in range(300)]
        assert {s.token for s in sample(logits.repeat(300, 1), rows)} == kept
    together = [row([0] * i, i, seed=3, typical_p=(0.2, 1.0)[i % 2], top_k=(0, 2)[i % 2]) for i in range(300)]
    tokens = [s.token for s in sample(logits.repeat(300, 1), together)]
    assert set(tokens[::2]) == {1} and set(tokens[1::2]) == {0, 1}, "each row by its own"


def test_temperature_zero_is_the_argmax() -> None:
    assert set(draw(20, temperature=0.0)) == {0}


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=8))
def test_a_row_is_sampled_the_same_alone_and_in_any_batch(keys: list[tuple[int, int, int]]) -> None:
    """Who else is in the batch, and on which worker, must not show."""
    rows = [row([1] * n, n, choice, seed=seed, top_p=0.9, top_k=4) for seed, choice, n in keys]
    together = [s.token for s in sample(LOGITS.repeat(len(rows), 1), rows)]
    alone = [sample(LOGITS.clone()[None], [r])[0].token for r in rows]
    assert together == alone


def test_uniforms_are_a_fixed_function() -> None:
    """A worker of another version must continue the same random stream: these are golden."""
    assert [round(uniform(s, c, p), 12) for s, c, p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))] == [
        0.156742553466,
        0.337761341267,
        0.463366746815,
        0.626999913463,
    ]


def test_choices_of_one_seed_differ() -> None:
    assert len({uniform(3, choice, 9) for choice in range(50)}) == 50


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_temperature_that_logits_cannot_be_divided_by_is_greedy(temperature: float) -> None:
    assert SamplingParams.from_proto(pb.SamplingParams(max_tokens=1, temperature=temperature)).temperature == 0.0


def test_repetition_penalty_reads_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.0]])
    [got] = sample(logits, [row([0, 1], 1, temperature=0.0, repetition_penalty=2.0)])
    assert got.token == 2  # 2.0 / 2 < 1.5; -1.0 * 2
    assert logits[0].tolist() == [1.0, -2.0, 1.5, 0.0]


def test_presence_and_frequency_penalties_read_only_the_output() -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0]])
    sample(logits, [row([0, 1, 1, 2], 1, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)])
    assert logits[0].tolist() == [2.0, 1.0, 1.25]


def test_logit_bias_moves_one_token() -> None:
    [got] = sample(LOGITS.clone()[None], [row(temperature=0.0, logit_bias={5: 100.0})])
    assert got.token == 5


@pytest.mark.parametrize(("num_output", "banned"), [(0, True), (2, True), (3, False)])
def test_min_tokens_bans_the_ends_until_enough_were_made(num_output: int, banned: bool) -> None:
    ends = {"eos_token_ids": frozenset({0}), "stop_token_ids": frozenset({1})}
    [got] = sample(LOGITS.clone()[None], [row([9] * num_output, 0, temperature=0.0, min_tokens=3, **ends)])
    assert got.token == (2 if banned else 0)


def test_logprobs_are_of_the_raw_distribution() -> None:
    """Penalties, bias and temperature must not show in them, as in vLLM."""
    [got] = sample(LOGITS.clone()[None], [row(temperature=0.0, logprobs=3, logit_bias={4: 50.0})])
    expected = LOGITS.log_softmax(-1)
    assert got.token == 4 and got.logprob == pytest.approx(expected[4].item())
    assert [token for token, _ in got.top] == [0, 1, 2]
    assert [value for _, value in got.top] == pytest.approx(expected[:3].tolist())


def test_finish_reasons() -> None:
    params = SamplingParams(max_tokens=3, eos_token_ids=frozenset({2}), stop_token_ids=frozenset({5}))
    assert params.finish(2, 1) == (pb.FINISH_REASON_STOP, None)
    assert params.finish(5, 1) == (pb.FINISH_REASON_STOP, 5)
    assert params.finish(4, 3) == (pb.FINISH_REASON_LENGTH, None)
    assert params.finish(4, 2) is None
    assert SamplingParams(max_tokens=3, eos_token_ids=frozenset({2}), ignore_eos=True).finish(2, 1) is None
