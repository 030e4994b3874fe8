"""A step that is lost, as on a device that is out of memory: its requests fail, and nobody else.

Where steps overlap, the one after it is under way by then, with the same requests and perhaps with others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Run, run_all
from gpu_runners import LIMITS, make_gpu_runner
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed
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
