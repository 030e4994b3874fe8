"""The whole engine on a GpuRunner: overlapping steps, preemption, prefix hits, forks; tokens as on TorchRunner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from tiny_models import ARCHITECTURES, make_model, reference_greedy

PROMPTS = [[7, 8, 9, 10, 11], list(range(20, 75)), [30] * 17, [5], list(range(100, 133))]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def limits(**changes: Any) -> EngineConfig:
    return EngineConfig(**(LIMITS.__dict__ | changes))


def gpu_engine(path: Path, *, kv_dtype: torch.dtype | None = None, **changes: Any) -> Engine:
    """Steps in the parts that graphs are made of, padded as they are; test_gpu_runner.py has those without."""
    config = limits(**changes)
    runner = make_gpu_runner(path, config, **({"kv_dtype": kv_dtype} if kv_dtype else {}))
    runner.capture_graphs(config.max_num_batched_tokens)
    return Engine(runner, config)


def torch_engine(path: Path, **changes: Any) -> Engine:
    config = limits(**changes)
    return Engine(make_torch_runner(path, config), config)


def test_every_architecture_says_what_transformers_says(model: Path) -> None:
    """Prompts longer than a step's budget and sequences that join one by one: mixed steps, decode steps, windows."""
    runs = [Run(prompt, max_tokens=12, logprobs=0) for prompt in PROMPTS[:3]]
    run_all(gpu_engine(model), *runs)
    for run, prompt in zip(runs, PROMPTS, strict=False):
        tokens, logprobs = reference_greedy(model, prompt, 12)
        assert run.tokens() == tokens
        assert run.logprobs() == pytest.approx(logprobs, abs=1e-3)


def test_preemption_changes_no_token(llama: Path) -> None:
    """Five sequences that outgrow a pool of sixteen blocks: some are computed again from their tokens."""
    runs = [Run(prompt, max_tokens=60, temperature=0.8, seed=i) for i, prompt in enumerate(PROMPTS)]
    alone = [Run(prompt, max_tokens=60, temperature=0.8, seed=i) for i, prompt in enumerate(PROMPTS)]
    engine = gpu_engine(llama, num_blocks=16)
    run_all(engine, *runs)
    assert engine.counters.preemptions > 0
    for run in alone:
        run_all(torch_engine(llama), run)
    assert [run.tokens() for run in runs] == [run.tokens() for run in alone]


def test_a_prefix_hit_changes_no_token(llama: Path) -> None:
    engine, prompt = gpu_engine(llama), list(range(40, 120))
    first, second = Run(prompt, max_tokens=10), Run([*prompt[:64], 9, 9], max_tokens=10)
    run_all(engine, first)
    run_all(engine, second)
    assert engine.counters.prompt_tokens_cached >= 64
    assert second.tokens() == reference_greedy(llama, [*prompt[:64], 9, 9], 10)[0]


REQUESTS = st.fixed_dictionaries({
    "prompt": st.integers(1, 60),
    "n": st.sampled_from([1, 1, 1, 3]),
    "max_tokens": st.integers(1, 20),
    "temperature": st.sampled_from([0.0, 0.9]),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
    "stop_token_ids": st.sampled_from([frozenset(), frozenset(range(0, 320, 9))]),
    "logprobs": st.sampled_from([None, None, 2]),
})  # fmt: skip


@settings(max_examples=8)
@given(st.lists(REQUESTS, min_size=1, max_size=6), st.sampled_from([16, 64]))
def test_any_mix_of_requests_gives_what_the_torch_runner_gives(
    llama: Path, requests: list[dict[str, Any]], num_blocks: int
) -> None:
    outcomes = []
    for engine in (gpu_engine(llama, num_blocks=num_blocks), torch_engine(llama)):
        runs = [
            Run([5 + 7 * i] * request["prompt"], seed=i, **{k: v for k, v in request.items() if k != "prompt"})
            for i, request in enumerate(requests)
        ]
        run_all(engine, *runs)
        outcomes.append([run.tokens(choice) for run in runs for choice in range(run.request.n)])
    assert outcomes[0] == outcomes[1]


def test_an_fp8_pool_serves_the_whole_life_of_a_request(llama: Path) -> None:
    """Copy-on-write, prefix cache and preemption move pages of bytes; none may read a free, poisoned one."""
    engine = gpu_engine(llama, kv_dtype=torch.float8_e4m3fn, num_blocks=16)
    runs = [Run(prompt, n=2, max_tokens=40, temperature=0.9, seed=i) for i, prompt in enumerate(PROMPTS)]
    run_all(engine, *runs)
    assert engine.counters.preemptions > 0
    assert all(len(run.tokens(choice)) == 40 for run in runs for choice in range(2))
    assert all(set(run.tokens()) != {0} for run in runs)
