"""How likely a prompt's own tokens were: equal to transformers', whatever the runner, the chunks and the company."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import Run, assert_empty, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_engine import scoring
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens, PromptScores
from pagewire_engine.scoring import Scores
from rank_threads import parallel_engine
from tiny_models import make_model, reference_logprobs

TOP = 5
FIELDS = "logprobs", "ranks", "top_ids", "top_logprobs"
TOLERANCE = 2e-4  # of log probabilities in float32, between two orders of summing

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "compiled": lambda path: make_engine(path),
    "torch": lambda path: Engine(make_torch_runner(path), LIMITS),
    "gpu": lambda path: Engine(make_gpu_runner(path), LIMITS),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * i * i + 11 * seed) % 300 + 5 for i in range(length)]


def asking(tokens: list[int], top: int = TOP, *, prefill_only: bool = False, max_tokens: int = 4) -> Run:
    run = Run(tokens, prefill_only=prefill_only, max_tokens=max_tokens)
    run.request.prompt_logprobs = top
    return run


def scores_of(run: Run) -> Scores:
    """What the parts add up to; they come without a gap, and before any token."""
    parts = [event for event in run.events if isinstance(event, PromptScores)]
    ends = np.cumsum([1, *(len(part.scores.logprobs) for part in parts)]).tolist()
    assert [part.begin for part in parts] == ends[:-1] and ends[-1] == len(run.request.prompt)
    kinds = [isinstance(event, PromptScores) for event in run.events]
    assert not parts or max(i for i, is_part in enumerate(kinds) if is_part) < len(kinds) - 1
    return Scores(*(np.concatenate([getattr(part.scores, name) for part in parts]) for name in FIELDS))


def assert_equal_bits(found: Scores, expected: Scores) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def assert_is_the_references(found: Scores, tokens: list[int], path: Path) -> None:
    raw = reference_logprobs(path, tokens)
    own = raw.gather(-1, torch.tensor(tokens[1:])[:, None])
    values, ids = raw.topk(found.top_ids.shape[1])
    np.testing.assert_allclose(found.logprobs, own[:, 0].numpy(), atol=TOLERANCE, rtol=0)
    assert found.ranks.tolist() == (raw >= own).sum(-1).tolist()
    assert found.top_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(found.top_logprobs, values.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("runner", ENGINES)
def test_they_are_the_references_beside_others_and_change_no_token(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are made for five rows at a time. A prompt whose beginning is cached is computed all the same."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 5 * 4 * 320)
    path = make_model(tmp_path / "model", "llama")
    engine = ENGINES[runner](path)
    plain = [
        Run(prompt(90), max_tokens=4),
        Run(prompt(9, 1), max_tokens=9, logprobs=2),
        Run(prompt(1, 2), max_tokens=9),
    ]
    run_all(engine, *plain)
    asked = [asking(prompt(90)), asking(prompt(9, 1), 0, max_tokens=9), asking(prompt(1, 2), max_tokens=9)]
    others = [Run(prompt(33, 3), max_tokens=12), asking(prompt(50, 4), prefill_only=True)]
    for run in (*asked, *others):
        engine.submit(run.request)
    while engine.step():
        engine.check()
    for run in (asked[0], asked[1], others[1]):
        assert_is_the_references(scores_of(run), run.request.prompt, path)
    assert not [event for event in asked[2].events if isinstance(event, PromptScores)], "a first token has none"
    assert [run.tokens() for run in asked] == [run.tokens() for run in plain]
    assert any(isinstance(event, FirstTokens) for event in others[1].events)
    engine.cancel(others[1].request)
    assert_empty(engine)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., Engine], dict[int, Scores]]:
    path = make_model(tmp_path_factory.mktemp("chunks") / "model", "qwen3")
    engine = make_engine(path, max_num_batched_tokens=256)
    whole = {}
    for length in (2, 31, 120, 200):
        run_all(engine, run := asking(prompt(length)))
        whole[length] = scores_of(run)
        assert_is_the_references(whole[length], run.request.prompt, path)
    return partial(make_engine, path), whole


@settings(max_examples=15)
@given(st.data())
def test_no_chunking_changes_a_bit(
    chunked: tuple[Callable[..., Engine], dict[int, Scores]], data: st.DataObject
) -> None:
    """Budgets of a step, what runs beside it, and a cache that already has some of the prompt."""
    make, whole = chunked
    engine = make(max_num_batched_tokens=data.draw(st.integers(3, 90)))
    run_all(engine, Run(prompt(data.draw(st.sampled_from([16, 48, 200]))), max_tokens=1))
    runs = [asking(prompt(length)) for length in data.draw(st.permutations(list(whole)))]
    beside = [Run(prompt(data.draw(st.integers(1, 60)), 5), max_tokens=20) for _ in range(2)]
    run_all(engine, *beside, *runs)
    for run in runs:
        assert_equal_bits(scores_of(run), whole[len(run.request.prompt)])


def test_a_preempted_prompt_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was told is not told again; the cache is read only as far as nobody wants what its tokens would give."""
    path = make_model(tmp_path / "model", "llama")
    engine = make_engine(path, max_num_batched_tokens=32)
    expected = asking(prompt(100))
    run_all(make_engine(path), expected)
    run = asking(prompt(100))
    engine.submit(run.request)
    engine.step()
    engine.step()
    [seq] = run.request.sequences
    assert (seq.num_computed, run.request.num_scored) == (64, 65)
    with engine._lock:
        engine._books.preempt(seq)
    assert len(engine._books.lookup(seq)) == 64 // 16
    while engine.step():
        engine.check()
    assert_equal_bits(scores_of(run), scores_of(expected))
    assert engine.counters.prompt_tokens_computed == 100


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_give_the_bits_of_one(tp: int, pp: int, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama")
    expected, found = asking(prompt(90)), asking(prompt(90))
    run_all(make_engine(path), expected)
    with parallel_engine(path, tp, pp) as engine:
        run_all(engine, found, Run(prompt(20, 1)))
    assert_equal_bits(scores_of(found), scores_of(expected))


def test_ranks_on_plain_torch_give_what_the_reference_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    path = make_model(tmp_path / "model", "llama")
    with parallel_engine(path, 2, 2) as engine:
        run_all(engine, run := asking(prompt(90)))
    assert_is_the_references(scores_of(run), run.request.prompt, path)


def test_there_are_never_more_logits_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 100 000 tokens and a vocabulary of 150 000 would be 60 GB."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 7 * 4 * 320)
    monkeypatch.setattr(scoring, "CACHED_BYTES", 2 * 4 * 320)
    head, rows = torch.randn(8, 320), torch.randn(100, 8)
    made: list[int] = []

    def logits(some: torch.Tensor) -> torch.Tensor:
        made.append(len(some))
        return some @ head

    ids = torch.arange(100, dtype=torch.int32)
    found = Scores.of(scoring.score_rows(rows, ids, 3, 320, logits))
    raw = torch.log_softmax(rows @ head, -1)
    assert made == [7] * 14 + [2]
    np.testing.assert_allclose(found.logprobs, raw[range(100), range(100)], atol=1e-5)
    assert found.top_ids.tolist() == raw.topk(3).indices.tolist()
    assert found.are_numbers
    broken = Scores.of(scoring.score_rows(rows, ids, 0, 320, lambda some: logits(some) * torch.nan))
    assert not broken.are_numbers
