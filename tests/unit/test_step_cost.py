"""The fitted step times that the router places by."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engines import Run, assert_empty, make_engine, run_all
from pagewire_engine.step_cost import LinearFit, StepCost
from pagewire_engine.warm_up import warm_up
from tiny_models import make_model, reference_greedy


def test_a_line_is_found_again() -> None:
    rng, fit = random.Random(0), LinearFit()
    for _ in range(200):
        x = rng.randrange(1, 500)
        fit.add(x, 5 + 0.2 * x + rng.gauss(0, 0.5))
    base, slope = fit.fit()
    assert base == pytest.approx(5, abs=0.5) and slope == pytest.approx(0.2, abs=0.01)


def test_steps_of_one_size_are_all_slope() -> None:
    fit = LinearFit()
    for _ in range(5):
        fit.add(8, 16)
    assert fit.fit() == (0.0, 2.0)


def test_more_work_never_looks_free_and_no_part_is_negative() -> None:
    falling, steep = LinearFit(), LinearFit()
    for x in range(1, 20):
        falling.add(x, 100 - x)
        steep.add(x, x * 10 - 9)
    assert falling.fit()[1] > 0 and steep.fit()[0] == 0


def test_one_held_up_step_does_not_make_a_worker_look_slow() -> None:
    """Two prefill workers once shared 24 prompts 3 to 21 because the first step of one had been slow."""
    cost = StepCost()
    for tokens in (8, 16, 32, 64, 8, 16):
        cost.add(tokens, 0, 2 + 0.1 * tokens)
    cost.add(16, 0, 400.0)
    fitted = cost.to_proto()
    assert fitted.prefill_base_ms + 16 * fitted.prefill_ms_per_token < 3 * 3.6


def test_mixed_steps_tell_nothing_while_decoding_is_unknown() -> None:
    cost = StepCost()
    cost.add(100, 3, 50.0)
    assert cost.to_proto().prefill_ms_per_token == cost.to_proto().decode_ms_per_sequence == 0
    assert cost.prefill_tokens(50.0) == 0


def mixed(rng: random.Random, scale: float = 1.0) -> tuple[int, int, float]:
    tokens, sequences = rng.randrange(16, 400), rng.randrange(1, 30)
    return tokens, sequences, 5 + scale * 0.2 * tokens + 0.5 * sequences + rng.gauss(0, 0.3)


def test_mixed_steps_tell_the_cost_of_prompts_beside_decoding_ones() -> None:
    """Under load there may be no other steps: the budget of prompts must not rest on what warming up saw."""
    rng, cost = random.Random(0), StepCost()
    for _ in range(30):
        sequences = rng.randrange(1, 30)
        cost.add(0, sequences, 5 + 0.5 * sequences + rng.gauss(0, 0.1))
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
        cost.add(0, 8, 10 + rng.gauss(0, 0.5))
    for _ in range(1500):
        tokens = 112 if rng.random() < 0.99 else 96
        cost.add(tokens, 8, 10 + 0.45 * tokens + rng.gauss(0, 5))
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
