"""A step that is lost, as on a device that is out of memory: its requests fail, and nobody else.

Where steps overlap, the one after it is under way by then, with the same requests and perhaps with others.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from engines import Run, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed
from scripted_batches import Script
from tiny_models import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def losing(path: Path, monkeypatch: pytest.MonkeyPatch, *lost: int) -> Engine:
    """An engine that loses the steps of these numbers, the first being 1."""
    runner = make_gpu_runner(path)
    run, launches = runner._run, iter(range(1, 1000))

    def lose(*args: object, **kwargs: object) -> object:
        if next(launches) in lost:
            raise MemoryError
        return run(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_run", lose)
    return Engine(runner, LIMITS)


def failed(run: Run) -> bool:
    return any(isinstance(event, Failed) for event in run.events)


@pytest.mark.parametrize(("prompt", "lost"), [(range(20, 100), 1), (range(20, 35), 2)], ids=["a prompt", "an answer"])
def test_nothing_of_its_requests_is_found_by_later_ones(
    prompt: range, lost: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it computes what follows, but what it should have computed is not there."""
    alone = Run([*prompt], max_tokens=20)
    run_all(Engine(make_gpu_runner(llama), LIMITS), alone)
    engine, first = losing(llama, monkeypatch, lost), Run([*prompt], max_tokens=20)
    run_all(engine, first)
    assert failed(first)
    again = Run([*prompt, *alone.tokens()[:1]], max_tokens=19)
    run_all(engine, again)
    assert again.tokens() == alone.tokens()[1:]


def test_who_comes_with_the_step_after_it_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That step refers to tokens of the lost one, which had more of them than the one before."""
    alone = Run(range(60, 70), max_tokens=10)
    run_all(Engine(make_gpu_runner(llama), LIMITS), alone)
    engine = losing(llama, monkeypatch, 3)
    first, second, third = Run([5, 6, 7], max_tokens=30), Run([8, 9], max_tokens=30), Run(range(60, 70), max_tokens=10)
    engine.submit(first.request)
    engine.step()
    engine.step()
    engine.submit(second.request)
    engine.step()
    run_all(engine, third)
    assert failed(first) and failed(second)
    assert third.tokens() == alone.tokens()


@pytest.mark.parametrize("where", ["gpu.kv_cache.GpuKVCache.copy_blocks", "gpu.tables.upload"])
def test_tables_that_it_would_have_brought_up_to_date_are_so_at_the_next(
    where: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences that have no row in it."""
    runner, script = make_gpu_runner(llama), Script()
    lost, other = script.add([5, 6, 7]), script.add(range(30, 70))
    runner.launch(script.batch((lost, 2), (other, 10)))
    script.bind(other, 40)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(f"pagewire_engine.{where}", Mock(side_effect=MemoryError))
        runner.launch(script.batch((lost, 1)))
    [sampled] = runner.launch(script.batch((other, 30))).tokens()
    whole = Script()
    [expected] = make_torch_runner(llama).launch(whole.batch((whole.add(range(30, 70)), 40))).tokens()
    assert sampled.token == expected.token
