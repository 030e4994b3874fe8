"""Speculation in an engine: the same tokens as without it, whatever the drafts are worth, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, assert_empty, make_engine, run_all
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_engine.engine import Engine
from pagewire_engine.loader import load
from pagewire_engine.metrics import SpeculationCollector
from pagewire_engine.options import EngineOptions
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.loading import load_proposer
from pagewire_engine.speculative.policy import Policy, Rates
from pagewire_engine.speculative.proposer import SpeculativeProposer
from pagewire_engine.speculative.step_times import Counts
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, make_model

NGRAM = SpeculativeConfig("ngram", 4, prompt_lookup_max=3, prompt_lookup_min=1)
OPTIONS: dict[str, Any] = {
    "block_size": 16, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 40, "max_model_len": 256,
    "poison_free_blocks": True, "device": "cpu",
}  # fmt: skip


class Always(Policy):
    """Every draft is tried: what is tested does not depend on how fast this machine is today."""

    def choose(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        return limits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary: its guesses are mostly wrong."""
    return make_model(tmp_path_factory.mktemp("smaller"), "llama", num_hidden_layers=1, seed=1)


def speculating(
    path: Path, config: SpeculativeConfig, draft: Path | None = None, policy: Policy | None = None, **changes: Any
) -> tuple[Engine, SpeculativeProposer]:
    options = EngineOptions(**(OPTIONS | changes))
    loaded = load(resolve_model(str(path)), options)
    proposer = load_proposer(config, loaded, options, resolve_model(str(draft)) if draft else None)
    proposer.policy = policy or Always()
    return Engine(loaded.runner, loaded.config, proposer=proposer), proposer


def drafting(path: Path, draft: Path, k: int = 3, **changes: Any) -> tuple[Engine, SpeculativeProposer]:
    return speculating(path, SpeculativeConfig("draft_model", k, model=str(draft)), draft, **changes)


def make_runs(seed: int = 0) -> list[Run]:
    """Greedy and sampled, penalties, choices, stop tokens; half of the prompts repeat themselves."""
    rng = random.Random(seed)
    cases: list[dict[str, Any]] = [
        {}, {"max_tokens": 1}, {"max_tokens": 40, "n": 2}, {"temperature": 1.0, "seed": 5, "n": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 6, "max_tokens": 30},
        {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "seed": 7, "max_tokens": 30},
        {"repetition_penalty": 1.2, "min_tokens": 9, "stop_token_ids": frozenset(range(0, VOCAB, 7))},
        {"stop_token_ids": frozenset(range(0, VOCAB, 9)), "max_tokens": 50}, {"logit_bias": {40: 9.0, 41: 9.0}},
        {"max_tokens": 60, "logprobs": 2},
    ]  # fmt: skip
    runs = []
    for index, params in enumerate(cases):
        phrase = [rng.randrange(5, VOCAB) for _ in range(rng.randrange(2, 12))]
        prompt = phrase * rng.randrange(2, 6) if index % 2 else [rng.randrange(5, VOCAB) for _ in range(40)]
        runs.append(Run(prompt, ignore_eos=True, **params))
    return runs


def outcome(runs: list[Run]) -> list[list[int]]:
    return [run.tokens(choice) for run in runs for choice in range(run.request.n)]


MAKERS: dict[str, Callable[[Path, Path], tuple[Engine, SpeculativeProposer]]] = {
    "ngram": lambda llama, smaller: speculating(llama, NGRAM),
    "the model itself": lambda llama, smaller: drafting(llama, llama),
    "another model": lambda llama, smaller: drafting(llama, smaller),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_tokens_are_the_same_as_without_drafts(maker: str, llama: Path, smaller: Path) -> None:
    plain = make_engine(llama)
    engine, proposer = MAKERS[maker](llama, smaller)
    expected, runs = make_runs(), make_runs()
    run_all(plain, *expected)
    run_all(engine, *runs)
    assert outcome(runs) == outcome(expected)
    for run, other in zip(runs, expected, strict=True):
        assert run.logprobs() == pytest.approx(other.logprobs(), abs=1e-4)
    assert proposer.num_held_blocks == 0
    counters = engine.counters
    assert counters.draft_tokens > counters.accepted_tokens > 0
    if maker == "the model itself":  # greedy drafts: what is sampled is often something else
        assert counters.accepted_tokens > counters.draft_tokens / 3
    assert sum(counters.accepted_per_position) == counters.accepted_tokens


def test_a_draft_pool_that_is_too_small_changes_nothing_but_the_number_of_drafts(
    llama: Path, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_engine.speculative.loading._free_bytes", lambda shape: 1 << 20)
    monkeypatch.setattr("pagewire_core.model_dir.ModelDir.weight_bytes", (1 << 20) - (38 << 10))
    engine, proposer = drafting(llama, smaller)  # 17 blocks of 2 KiB, one of them too many for one sequence
    expected, runs = make_runs(), make_runs()
    run_all(make_engine(llama), *expected)
    run_all(engine, *runs)
    assert outcome(runs) == outcome(expected)
    assert proposer.num_held_blocks == 0 and engine.counters.draft_tokens


def test_a_draft_model_that_fails_costs_its_sequences_their_drafts_and_nothing_else(
    llama: Path, tmp_path: Path
) -> None:
    """Rows of tokens that nobody trained are not always numbers. A prompt with one ended the loop, and the worker."""
    broken = make_model(tmp_path, "llama", num_hidden_layers=1)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][300] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    engine, proposer = drafting(llama, broken)
    failing = Run([10, 11, 300, 12], max_tokens=20, ignore_eos=True)
    run_all(engine, failing)
    assert not engine.counters.draft_tokens
    expected, runs = make_runs(), make_runs()
    run_all(make_engine(llama), *expected)
    run_all(engine, *runs)
    assert outcome(runs) == outcome(expected)
    assert engine.counters.draft_tokens and not proposer.num_held_blocks


def test_the_plain_torch_runner_takes_drafts_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    engine, _ = speculating(llama, NGRAM)
    expected, runs = make_runs()[2:6], make_runs()[2:6]
    run_all(make_engine(llama), *expected)
    run_all(engine, *runs)
    assert outcome(runs) == outcome(expected)
    assert engine.counters.accepted_tokens


def test_a_draft_that_is_the_target_is_always_right_and_saves_its_steps(llama: Path) -> None:
    engine, _ = drafting(llama, llama)
    run = Run(range(10, 40), max_tokens=42, ignore_eos=True)
    run_all(engine, run)
    assert engine.counters.accepted_tokens == engine.counters.draft_tokens == 30
    assert engine.counters.steps == 1 + 11  # the prompt, then 41 tokens in steps of 4


@pytest.mark.parametrize("maker", ["ngram", "the model itself"])
def test_a_pool_that_forces_preemption_gives_the_same_tokens(maker: str, llama: Path) -> None:
    def runs() -> list[Run]:
        return [Run([7 + i, 9, 11] * 6, max_tokens=90, ignore_eos=True) for i in range(6)]

    small: dict[str, Any] = {"kv_cache_memory_bytes": 16 * 16 * 384, "max_model_len": 128}
    plain = make_engine(llama, **small)
    engine, proposer = speculating(llama, NGRAM, **small) if maker == "ngram" else drafting(llama, llama, **small)
    expected, speculated = runs(), runs()
    run_all(plain, *expected)
    run_all(engine, *speculated)
    assert engine.counters.preemptions and engine.counters.accepted_tokens
    assert outcome(speculated) == outcome(expected)
    assert proposer.num_held_blocks == 0


@pytest.mark.parametrize("maker", ["ngram", "another model"])
def test_cancelled_sequences_leave_nothing_behind(maker: str, llama: Path, smaller: Path) -> None:
    engine, proposer = MAKERS[maker](llama, smaller)
    runs = make_runs()
    for run in runs:
        engine.submit(run.request)
    rng = random.Random(3)
    while engine.step():
        engine.check()
        run = rng.choice(runs)
        engine.cancel(run.request, [0] if rng.random() < 0.5 else [])
    assert_empty(engine)
    assert proposer.num_held_blocks == 0


def test_the_policy_measures_the_engines_steps_and_starts_to_speculate(llama: Path) -> None:
    """Over the engine's own observations: the first drafts come after four plain steps."""
    policy = Policy()
    engine, _ = speculating(llama, NGRAM, policy=policy)
    run = Run([5, 6, 7, 8] * 10, max_tokens=60, ignore_eos=True)
    run_all(engine, run)
    assert policy.times.knows_plain and policy.times.knows_extra
    assert policy.times.plain(1) > 0
    assert engine.counters.draft_tokens > 0


def test_a_draft_model_of_another_vocabulary_is_refused(llama: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path, "llama", vocab_size=VOCAB + 8)
    with pytest.raises(StartupError, match=f"vocabulary of {VOCAB + 8} tokens and the target one of {VOCAB}"):
        drafting(llama, other)


def test_a_shorter_draft_model_serves_a_longer_target(llama: Path, tmp_path: Path) -> None:
    """Behind its last position there are no drafts; nothing else changes."""
    short = make_model(tmp_path, "llama", max_position_embeddings=64, num_hidden_layers=1)
    engine, _ = drafting(llama, short)
    expected, run = (
        Run(range(10, 50), max_tokens=60, ignore_eos=True),
        Run(range(10, 50), max_tokens=60, ignore_eos=True),
    )
    run_all(make_engine(llama), expected)
    run_all(engine, run)
    assert run.tokens() == expected.tokens()
    assert 0 < engine.counters.draft_tokens <= 3 * 24  # of 3 * 59


def test_target_and_draft_share_the_memory_that_is_not_given_by_size(
    llama: Path, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_engine.resources.DEFAULT_CPU_KV_BYTES", 8 << 20)
    options = EngineOptions(**(OPTIONS | {"kv_cache_memory_bytes": None}))
    model, draft = resolve_model(str(llama)), resolve_model(str(smaller))
    alone, beside = load(model, options), load(model, options, draft)
    # Three layers of KV against one, and the draft's weights besides.
    assert 0.7 < beside.config.num_blocks / alone.config.num_blocks < 0.75


def test_what_became_of_drafts_is_told_by_the_metrics(llama: Path) -> None:
    engine, proposer = drafting(llama, llama, k=2)
    run_all(engine, Run(range(10, 20), max_tokens=31, ignore_eos=True))
    samples = {
        (sample.name.removeprefix("pagewire_spec_decode_"), *sample.labels.values()): sample.value
        for metric in SpeculationCollector(engine, proposer).collect()
        for sample in metric.samples
    }
    assert samples == {
        ("num_drafts_total",): 10, ("num_draft_tokens_total",): 20, ("num_accepted_tokens_total",): 20,
        ("num_accepted_tokens_per_pos_total", "0"): 10, ("num_accepted_tokens_per_pos_total", "1"): 10,
        ("draft_tokens_per_sequence",): 2.0, ("draft_blocks",): 0,
    }  # fmt: skip


def test_proposals_respect_the_longest_sequence(llama: Path) -> None:
    engine, _ = speculating(llama, NGRAM, max_model_len=64)
    run = Run([5, 6] * 20, max_tokens=100, ignore_eos=True)
    run_all(engine, run)
    assert len(run.tokens()) == 24
