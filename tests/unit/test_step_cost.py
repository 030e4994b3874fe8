"""The fitted step times that the router places by."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engines import Run, assert_empty, make_engine, run_all
from hypothesis import given
from hypothesis import strategies as st
from pagewire_engine.step_cost import LinearFit, StepCost
from pagewire_engine.warm_up import warm_up
from tiny_models import make_model, reference_greedy

SPREAD = (3.0, 10.0, 1e-3)


def test_a_plane_is_found_again() -> None:
    """What a prompt's tokens attend to tells apart a long prompt and as many tokens of short ones."""
    rng, fit = random.Random(0), LinearFit(SPREAD)
    for _ in range(400):
        tokens, cached = rng.randrange(1, 500), rng.choice([0, 0, 2000, 8000])
        attended = tokens * (cached + tokens / 2)
        fit.add(tokens, attended, 5 + 0.2 * tokens + 1e-4 * attended + rng.gauss(0, 0.5))
    a, b, c = fit.fit()
    assert a == pytest.approx(5, abs=0.7) and b == pytest.approx(0.2, abs=0.01) and c == pytest.approx(1e-4, rel=0.02)


def test_steps_of_one_size_are_all_slope() -> None:
    fit = LinearFit(SPREAD)
    for _ in range(50):
        fit.add(8, 32, 16)
    assert fit.fit() == pytest.approx((0.0, 2.0, 0.0), abs=0.05)


def test_what_was_learnt_outlasts_steps_that_are_all_alike() -> None:
    """With plain forgetting an hour of eight sequences a step would leave a slope made of noise."""
    rng, fit = random.Random(0), LinearFit((3.0, 10.0, 1e-2))
    for _ in range(300):
        batch = rng.randrange(1, 40)
        fit.add(batch, batch * rng.randrange(100, 900), 10 + 0.5 * batch + rng.gauss(0, 0.3))
    for _ in range(20_000):
        fit.add(8, 8 * 500, 14 + rng.gauss(0, 0.3))
    assert fit.at(8, 8 * 500) == pytest.approx(14, abs=0.2)
    assert fit.at(40, 40 * 500) == pytest.approx(30, abs=3)


def test_a_worker_that_becomes_slower_is_noticed_within_some_hundred_steps() -> None:
    rng, fit = random.Random(0), LinearFit(SPREAD)
    for factor in (1, 3):
        for _ in range(400):
            tokens = rng.randrange(16, 500)
            fit.add(tokens, tokens**2 / 2, factor * (5 + 0.2 * tokens) + rng.gauss(0, 0.5))
        assert fit.at(256, 256**2 / 2) == pytest.approx(factor * 56.2, rel=0.15)


def test_more_work_never_looks_free_and_no_part_is_negative() -> None:
    falling, steep = LinearFit(SPREAD), LinearFit(SPREAD)
    for x in range(1, 20):
        falling.add(x, 0, 100 - x)
        steep.add(x, 0, x * 10 - 9)
    assert falling.fit()[1] > 0 and steep.fit()[0] == 0


@given(
    st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 100_000), st.floats(0.1, 1e4)), min_size=1, max_size=200)
)
def test_whatever_comes_the_parts_are_finite_and_not_negative(steps: list[tuple[int, int, float]]) -> None:
    fit = LinearFit(SPREAD)
    for tokens, cached, milliseconds in steps:
        fit.add(tokens, tokens * (cached + tokens / 2), milliseconds)
        assert all(0 <= part < float("inf") for part in fit.fit())


def test_one_held_up_step_does_not_make_a_worker_look_slow() -> None:
    """Two prefill workers once shared 24 prompts 3 to 21 because the first step of one had been slow."""
    cost = StepCost()
    for tokens in (8, 16, 32, 64, 8, 16):
        cost.add((tokens, 0), (0, 0), 2 + 0.1 * tokens)
    cost.add((16, 0), (0, 0), 400.0)
    fitted = cost.to_proto()
    assert fitted.prefill_base_ms + 16 * fitted.prefill_ms_per_token < 3 * 3.6


@pytest.mark.parametrize("dearer", [1.0, 3.0])
def test_a_long_prompt_does_not_look_cheap_to_a_worker_that_has_seen_none(dearer: float) -> None:
    """Without that such workers were sent one long prompt after the other, and none came to those that had learnt."""
    rng, cost, attention_work = random.Random(0), StepCost(1e-4), 1e-4

    def milliseconds(tokens: int, before: int) -> float:
        attended = tokens * (before + tokens / 2)
        return float(10 + 0.2 * (tokens + dearer * attention_work * attended) * rng.lognormvariate(0, 0.05))

    def of_a_prompt(tokens: int) -> float:
        fitted = cost.to_proto()
        return fitted.prefill_ms_per_token * tokens + fitted.prefill_ms_per_attended * tokens**2 / 2

    for _ in range(30):
        tokens = rng.randrange(16, 500)
        cost.add((tokens, tokens**2 / 2), (0, 0), milliseconds(tokens, 0))
    tokens = 10_000
    least = 0.2 * (tokens + attention_work * tokens**2 / 2)
    assert of_a_prompt(tokens) > 0.9 * least
    for start in range(0, tokens, 2000):  # the first one
        cost.add((2000, 2000 * (start + 1000)), (0, 0), milliseconds(2000, start))
    whole = 0.2 * (tokens + dearer * attention_work * tokens**2 / 2)
    assert of_a_prompt(tokens) == pytest.approx(whole, rel=0.15)


def test_mixed_steps_tell_nothing_while_decoding_is_unknown() -> None:
    cost = StepCost()
    cost.add((100, 0), (3, 0), 50.0)
    assert cost.to_proto().prefill_ms_per_token == cost.to_proto().decode_ms_per_sequence == 0
    assert cost.prefill_tokens(50.0) == 0


def mixed(rng: random.Random, scale: float = 1.0) -> tuple[tuple[int, float], tuple[int, int], float]:
    tokens, sequences = rng.randrange(16, 400), rng.randrange(1, 30)
    return (tokens, 0.0), (sequences, 0), 5 + scale * 0.2 * tokens + 0.5 * sequences + rng.gauss(0, 0.3)


def test_mixed_steps_tell_the_cost_of_prompts_beside_decoding_ones() -> None:
    """Under load there may be no other steps: the budget of prompts must not rest on what warming up saw."""
    rng, cost = random.Random(0), StepCost()
    for _ in range(30):
        sequences = rng.randrange(1, 30)
        cost.add((0, 0), (sequences, 0), 5 + 0.5 * sequences + rng.gauss(0, 0.1))
    for _ in range(100):
        cost.add(*mixed(rng))
    assert cost.to_proto().prefill_ms_per_token == pytest.approx(0.2, abs=0.02)
    assert cost.to_proto().decode_ms_per_sequence == pytest.approx(0.5, abs=0.05)
    assert cost.prefill_tokens(50.0) == pytest.approx(250, abs=25)
    assert 200 < cost.prefill_tokens(1000.0) < 500, "no further than twice what it has seen"
    for _ in range(300):  # prompts grow long: attention makes each token twice as dear
        cost.add(*mixed(rng, 2.0))
    assert cost.prefill_tokens(50.0) == pytest.approx(125, abs=15)


def test_chunks_of_one_size_do_not_make_prompts_look_free() -> None:
    """A budget gives chunks of one size; noise of a few ms must not turn into a slope of nothing."""
    rng, cost = random.Random(0), StepCost()
    for _ in range(50):
        cost.add((0, 0), (8, 0), 10 + rng.gauss(0, 0.5))
    for _ in range(1500):
        tokens = 112 if rng.random() < 0.99 else 96
        cost.add((tokens, 0), (8, 0), 10 + 0.45 * tokens + rng.gauss(0, 5))
        assert cost.prefill_tokens(50.0) <= 50 / 0.45 * 1.25


def test_warming_up_leaves_costs_and_nothing_else(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    engine = make_engine(path)
    warm_up(engine)
    assert_empty(engine)
    fitted = engine.step_cost.to_proto()
    assert fitted.prefill_base_ms + fitted.prefill_ms_per_token > 0
    assert fitted.decode_base_ms + fitted.decode_ms_per_sequence > 0
    assert engine.snapshot() == [] and engine.blocks.num_free == engine.config.num_blocks
    assert engine.counters.tokens_sampled == engine.counters.prompt_tokens_computed == 0
    run = Run([7] * 30)
    run_all(engine, run)
    assert run.tokens() == reference_greedy(path, [7] * 30, 12)[0]
