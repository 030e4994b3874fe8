"""When drafts pay: acceptance rates, step times, and the choice they lead to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire_engine.speculative.acceptance import OverallRate, Prediction
from pagewire_engine.speculative.policy import Policy

StepMs = Callable[[int, int], float]  # sequences, draft rows


def _policy(step_ms: StepMs, draft_ms: float = 0.0, disable_by_batch_size: int | None = None) -> Policy:
    """A policy that has seen some steps of such a machine."""
    policy = Policy(disable_by_batch_size)
    for sequences in (1, 2, 4, 8):
        policy.observe(sequences, 0, step_ms(sequences, 0))
    for rows in (1, 3, 6, 12, 24):
        policy.observe(4, rows, step_ms(4, rows))
        policy.times.add_drafting(4, 1, draft_ms)
    return policy


def _choose(policy: Policy, rates: Sequence[float], limits: Sequence[int]) -> list[int]:
    return policy.choose(len(rates), np.array(rates), np.array(limits, np.int64)).tolist()


def _gpu(sequences: int, rows: int) -> float:
    return 8.0 + 0.01 * (sequences + rows)


def _cpu(sequences: int, rows: int) -> float:
    return 10.0 + 8.0 * (sequences + rows)


def test_where_a_row_is_nearly_free_everything_is_proposed() -> None:
    assert _choose(_policy(_gpu), [0.7] * 8, [4] * 8) == [4] * 8


def test_where_a_row_costs_a_step_only_what_is_nearly_sure_is_proposed() -> None:
    policy = _policy(_cpu)
    assert _choose(policy, [0.5] * 8, [4] * 8) == [0] * 8
    sure = _choose(policy, [0.5] * 6 + [0.98] * 2, [4] * 8)
    assert sure == [0] * 6 + [4] * 2


def test_alone_a_sequence_gets_drafts_that_in_a_batch_do_not_pay() -> None:
    """The same machine and the same acceptance: the base of a step is shared by the batch."""
    policy = _policy(_cpu)
    assert _choose(policy, [0.75], [4])[0] > 0
    assert not any(_choose(policy, [0.75] * 16, [4] * 16))


def test_the_time_of_the_draft_model_counts() -> None:
    assert _choose(_policy(_gpu, draft_ms=0.5), [0.7] * 4, [4] * 4) == [4] * 4
    few = _choose(_policy(_gpu, draft_ms=2.5), [0.7] * 4, [4] * 4)
    assert 0 < few[0] < 4
    assert _choose(_policy(_gpu, draft_ms=9.0), [0.7] * 4, [4] * 4) == [0] * 4


def test_more_sequences_than_disable_by_batch_size_get_no_drafts() -> None:
    policy = _policy(_gpu, disable_by_batch_size=2)
    assert _choose(policy, [0.9] * 2, [3] * 2) == [3] * 2
    assert _choose(policy, [0.9] * 3, [3] * 3) == [0] * 3


@given(
    st.lists(st.tuples(st.floats(0.05, 0.95), st.integers(1, 3)), min_size=1, max_size=4),
    st.floats(1, 20),
    st.floats(0.05, 10),
)
def test_the_choice_is_the_best_of_all_choices_within_its_margin(
    sequences: list[tuple[float, int]], base: float, row_ms: float
) -> None:
    policy = _policy(lambda n, rows: base + row_ms * (n + rows))
    rates, limits = [rate for rate, _ in sequences], [limit for _, limit in sequences]

    def speed(counts: Sequence[int]) -> float:
        tokens = len(rates) + sum(p**i for p, k in zip(rates, counts, strict=True) for i in range(1, k + 1))
        return tokens / (base + row_ms * (len(rates) + sum(counts)))

    best = max(speed(counts) for counts in itertools.product(*(range(limit + 1) for limit in limits)))
    assert speed(_choose(policy, rates, limits)) > best / 1.05


def test_the_first_steps_are_plain_then_some_have_drafts() -> None:
    """Nothing is assumed of the machine: both kinds of steps are measured first."""
    policy = Policy()
    kinds = []
    for _ in range(8):
        [count] = _choose(policy, [0.9], [3])
        kinds.append(count)
        policy.observe(1, count, _cpu(1, count))
    assert kinds == [0] * 4 + [3] * 4


@pytest.mark.parametrize("machine", [_gpu, _cpu])
def test_a_machine_that_changes_is_noticed(machine: StepMs) -> None:
    """Off or on, the other kind of step is tried now and then; what does not pay is tried seldom."""
    policy = _policy(machine)
    turned = _cpu if machine is _gpu else _gpu
    rng = random.Random(0)
    counts: list[int] = []
    for step in range(3000):
        count = sum(_choose(policy, [0.6] * 8, [3] * 8))
        policy.observe(8, count, (machine if step < 1000 else turned)(8, count) * rng.uniform(0.9, 1.1))
        counts.append(count)
    off, on = (counts[:1000], counts[2000:]) if machine is _cpu else (counts[2000:], counts[:1000])
    assert 0 < sum(1 for count in off if count) < 50, "drafts that do not pay"
    assert 0 < sum(1 for count in on if not count) < 50, "drafts that would pay"


def test_an_acceptance_rate_follows_what_comes_true() -> None:
    overall = OverallRate()
    good, bad = Prediction(overall), Prediction(overall)
    tokens = list(range(100))
    for begin in range(1, 60):
        good.make([begin, begin + 1], begin)
        bad.make([0, 0], begin)
        good.settle(tokens[: begin + 3])
        bad.settle(tokens[: begin + 1])
    assert good.rate > 0.9 > 0.2 > bad.rate
    assert 0.5 < Prediction(overall).rate < 0.8, "a new sequence is believed to be like the others: two of three tokens"


def test_tokens_that_were_not_reached_say_nothing_of_a_draft() -> None:
    """Of three drafts the second was wrong: the third was neither right nor wrong."""
    one, two = Prediction(OverallRate()), Prediction(OverallRate())
    one.make([1, 9, 3], 0)
    one.settle([1, 2])
    two.make([1, 9], 0)
    two.settle([1, 2])
    assert one.rate == two.rate
