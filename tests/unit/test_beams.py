"""Beam search against one that runs every round and forgets nothing, over models that are tables."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import common_pb2
from pagewire_router.beams import Beam, Beams

VOCAB, EOS, PROMPT = 9, {1, 4}, 3
Sequences = list[tuple[list[int], float]]


def offered(tokens: Sequence[int], seed: int, width: int) -> list[common_pb2.SampledToken]:
    """A model's likeliest next tokens, which depend on all before; sharp, so that some beams are far better."""
    rng = random.Random(str((seed, tuple(tokens))))
    weights = [rng.random() ** 6 + 1e-9 for _ in range(VOCAB)]
    logprobs = {token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)}
    best = sorted(logprobs, key=lambda token: -logprobs[token])[: 2 * width]
    return [common_pb2.SampledToken(token_id=token, logprob=logprobs[token]) for token in best]


def plain(seed: int, width: int, rounds: int, penalty: float, ignore_eos: bool) -> Sequences:
    live, ended = [(list[int](), 0.0)], Sequences()
    for _ in range(rounds):
        found = [
            ([*tokens, t.token_id], total + t.logprob) for tokens, total in live for t in offered(tokens, seed, width)
        ]
        ended += [beam for beam in found if beam[0][-1] in EOS and not ignore_eos]
        live = sorted((b for b in found if ignore_eos or b[0][-1] not in EOS), key=lambda b: b[1], reverse=True)[:width]

    def score(beam: tuple[list[int], float]) -> float:
        return beam[1] / (PROMPT + len(beam[0]) - (beam[0][-1] in EOS)) ** penalty

    return sorted([*ended, *live], key=score, reverse=True)[:width]


def run(beams: Beams, seed: int) -> int:
    """Searches; how many rounds it took."""
    for done in range(1, beams.max_tokens + 1):
        beams.advance([offered(beam.ids, seed, beams.width) for beam in beams.live])
        if beams.settled:
            return done
    return beams.max_tokens


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 8), st.floats(-10, 10) | st.sampled_from([0.0, 1.0]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_what_is_found_is_what_all_rounds_would_find(
    seed: int, width: int, rounds: int, penalty: float, ignore_eos: bool, keep_end: bool
) -> None:
    beams = Beams(width, penalty, PROMPT, rounds, EOS, ignore_eos, keep_end)
    run(beams, seed)
    expected = plain(seed, width, rounds, penalty, ignore_eos)
    assert [beam.total for beam in beams.best()] == [total for _, total in expected]
    for beam, (tokens, _) in zip(beams.best(), expected, strict=True):
        ended = tokens[-1] in EOS and not ignore_eos
        assert beam.ids == (tokens[:-1] if ended and not keep_end else tokens)
        assert beam.ended_by == (tokens[-1] if ended else None)


def test_a_search_ends_when_nothing_better_can_come() -> None:
    """Without a penalty only sums count, and they fall: thousands of rounds are not run."""
    assert run(Beams(2, 0.0, PROMPT, 5000, EOS), 1) < 30
    assert run(Beams(2, 0.0, PROMPT, 30, EOS, ignore_eos=True), 1) == 30


def test_a_search_ends_when_all_that_may_come_is_an_end() -> None:
    beams = Beams(1, 1.0, PROMPT, 9, EOS)
    beams.advance([[common_pb2.SampledToken(token_id=token, logprob=-1.0) for token in EOS]])
    assert beams.settled and not beams.live
    assert beams.best() == [Beam((), -1.0, min(EOS))]


@pytest.mark.parametrize(("penalty", "best"), [(0.0, 0), (0.5, 0), (0.6, 2), (1.0, 2)])
def test_the_penalty_weighs_length_which_counts_the_prompt_and_no_end(penalty: float, best: int) -> None:
    """-0.4 of 1 token against -0.7 of 3."""
    beams = Beams(1, penalty, 1, 2, {0})
    beams.advance([[_token(0, -0.4), _token(7, -0.4)]])
    beams.advance([[_token(8, -0.3), _token(9, -2.0)]])
    assert [len(beam.tokens) for beam in beams.best()] == [best]


def _token(token_id: int, logprob: float) -> common_pb2.SampledToken:
    return common_pb2.SampledToken(token_id=token_id, logprob=logprob)
