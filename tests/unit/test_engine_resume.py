"""A request that goes on where another engine stopped gives what that one would have given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import Run, assert_empty, make_engine, run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_engine.engine import Engine
from pagewire_engine.events import Token
from tiny_models import VOCAB, make_model

LAYERS = 3
STYLES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {
        "temperature": 1.2,
        "seed": 11,
        "top_k": 20,
        "top_p": 0.9,
        "min_tokens": 8,
        "eos_token_ids": frozenset(range(5, 60)),
    },
    {"temperature": 0.0, "logit_bias": {9: 4.0}, "stop_token_ids": frozenset(range(60, 90))},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def lost(path: Path) -> Engine:
    return make_engine(path, enable_prefix_caching=False)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix cache", "no prefix cache"])
def other(path: Path, request: pytest.FixtureRequest) -> Engine:
    return make_engine(path, enable_prefix_caching=request.param)


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(5, VOCAB) for _ in range(length)]


def transferred(lost: Engine, other: Engine, prompt: Sequence[int]) -> list[int]:
    """A block table of `other` with the prompt's KV, computed by `lost`."""
    computed = Run(prompt, prefill_only=True)
    lost.submit(computed.request)
    while lost.step():
        pass
    everything = (0, LAYERS), (0, len(prompt))
    wire = lost.runner.cache.gather(lost.block_table(computed.request), *everything)
    lost.release(computed.request)
    table = other.blocks.allocate(other.config.blocks_for(len(prompt)))
    other.runner.cache.scatter(wire, table, *everything)
    return table


def tokens_of(run: Run, choice: int) -> list[Token]:
    return [event for event in run.events if isinstance(event, Token) and event.choice == choice]


@settings(max_examples=60)
@given(
    length=st.integers(1, 90),
    style=st.sampled_from(STYLES),
    cuts=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    transfer=st.booleans(),
)
def test_it_gives_the_rest_of_every_choice(
    lost: Engine, other: Engine, length: int, style: dict[str, Any], cuts: list[int], transfer: bool
) -> None:
    prompt = prompt_of(length)
    whole = Run(prompt, n=len(cuts), max_tokens=24, **style)
    run_all(lost, whole)
    prior: list[list[int] | None] = []
    for choice, cut in enumerate(cuts):
        output = whole.tokens(choice)
        prior.append(output[:cut] if cut < len(output) else None)
    rest = Run(prompt, n=len(cuts), max_tokens=24, **style)
    if any(output is not None for output in prior):
        table = transferred(lost, other, prompt) if transfer else ()
        other.resume(rest.request, prior, table)
        run_all(other)
    for choice, cut in enumerate(cuts):
        assert tokens_of(rest, choice) == tokens_of(whole, choice)[cut:]
    assert_empty(lost)
    assert_empty(other)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_leaving_it_gives_everything_back(lost: Engine, other: Engine, steps: int) -> None:
    prompt = prompt_of(70)
    run = Run(prompt, n=3, max_tokens=40)
    other.resume(run.request, [[5, 6], None, [7] * 20], transferred(lost, other, prompt))
    for _ in range(steps):
        other.step()
    other.cancel(run.request)
    while other.step():
        pass
    assert_empty(other)


def test_a_prompt_that_was_handed_over_is_not_computed_again(path: Path, lost: Engine) -> None:
    """But for the last, half-full block of it."""
    other, prompt = make_engine(path), prompt_of(70)
    run = Run(prompt, n=2, max_tokens=30)
    other.resume(run.request, [[5] * 10, [6] * 10], transferred(lost, other, prompt))
    run_all(other)
    assert other.counters.prompt_tokens_computed <= 2 * (70 - 64)
