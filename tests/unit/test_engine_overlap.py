"""Steps launched one ahead with a real model: TorchRunner, whose tokens are read a step later."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, assert_empty, make_engine, run_all
from pagewire_engine.batch import Batch
from pagewire_engine.engine import Engine
from pagewire_engine.model_runner import Launched, TorchRunner
from tiny_models import VOCAB, make_model


class AheadRunner(TorchRunner):
    """Understands negative input ids: its last step's tokens stay in a tensor until the next step reads them."""

    overlaps = True
    last = torch.zeros(0, dtype=torch.int32)

    def launch(self, batch: Batch) -> Launched:
        ids = torch.from_numpy(batch.input_ids)
        if len(self.last):
            ids = torch.where(ids < 0, self.last[(-1 - ids).clamp(0, len(self.last) - 1)], ids)
        step = super().launch(replace(batch, input_ids=ids.numpy()))
        self.last = torch.tensor([sampled.token for sampled in step.tokens()], dtype=torch.int32)
        return step


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def engine_of(path: Path, monkeypatch: pytest.MonkeyPatch, *, ahead: bool, **options: Any) -> Engine:
    monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    plain = make_engine(path, **options)
    assert isinstance(plain.runner, TorchRunner)
    return Engine(AheadRunner(plain.runner.model, plain.runner.cache), plain.config) if ahead else plain


def mix(seed: int) -> list[Run]:
    rng = random.Random(seed)
    common = [rng.randrange(5, VOCAB) for _ in range(40)]
    return [
        Run(
            common[: rng.choice([0, 16, 40])] + [rng.randrange(5, VOCAB) for _ in range(rng.randrange(1, 50))],
            n=rng.choice([1, 1, 2, 3]), max_tokens=rng.randrange(1, 25), temperature=rng.choice([0.0, 0.9]), seed=i,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]), min_tokens=rng.choice([0, 0, 3]),
            stop_token_ids=frozenset(rng.sample(range(VOCAB), 4)), logprobs=rng.choice([None, 2]),
        )
        for i in range(7)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"kv_cache_memory_bytes": 384 * 144, "max_model_len": 128}])
def test_tokens_are_those_of_a_loop_that_waits(
    options: dict[str, Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix hits, forks, stops, penalties; and with a pool too small for all, preemption."""
    waits, ahead = mix(7), mix(7)
    run_all(engine_of(llama, monkeypatch, ahead=False, **options), *waits)
    engine = engine_of(llama, monkeypatch, ahead=True, **options)
    run_all(engine, *ahead)
    assert (engine.counters.preemptions > 0) == bool(options)
    for one, other in zip(waits, ahead, strict=True):
        for choice in range(one.request.n):
            assert one.tokens(choice) == other.tokens(choice)
            assert one.logprobs(choice) == pytest.approx(other.logprobs(choice), abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_request_that_is_cancelled_leaves_nothing_behind(
    steps: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llama, monkeypatch, ahead=True)
    run, other = mix(3)[:2]
    engine.submit(run.request)
    engine.submit(other.request)
    for _ in range(steps):
        engine.step()
    engine.cancel(run.request)
    said = len(run.events)
    while engine.step():
        engine.check()
    assert_empty(engine)
    assert len(run.events) == said
    alone = mix(3)[1]
    run_all(engine_of(llama, monkeypatch, ahead=False), alone)
    assert [other.tokens(c) for c in range(other.request.n)] == [alone.tokens(c) for c in range(alone.request.n)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_block_that_is_copied_is_there_until_then(ahead: bool, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other choice, which waits for its turn, ends between the decision and the step. Free blocks are poisoned."""
    alone = Run([7, 8, 9], max_tokens=5, n=2)
    run_all(engine_of(llama, monkeypatch, ahead=False), alone)
    engine = engine_of(llama, monkeypatch, ahead=ahead, max_num_batched_tokens=16, max_num_seqs=32)
    others = [Run([20 + i], max_tokens=40) for i in range(15)]
    run = Run([7, 8, 9], max_tokens=5, n=2)
    launch = engine.runner.launch

    def launch_late(batch: Batch) -> Launched:
        if batch.copies:
            engine.cancel(run.request, [0])
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", launch_late)
    run_all(engine, *others, run)
    assert run.tokens(1) == alone.tokens(1)
