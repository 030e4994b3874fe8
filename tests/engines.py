"""An engine in this process, on a tiny checkpoint: our own single-process reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagewire_core.model_dir import resolve_model
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, Token
from pagewire_engine.loader import load
from pagewire_engine.options import EngineOptions
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request

ROOT = b"r" * 32


# Poisoned free pages, a small pool and chunks that do not depend on the clock.
OPTIONS: dict[str, Any] = {
    "block_size": 16, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 40, "max_model_len": 256,
    "poison_free_blocks": True, "device": "cpu", "max_prefill_delay_ms": 0.0,
}  # fmt: skip


def make_engine(path: Path, **options: Any) -> Engine:
    """With OPTIONS unless told otherwise."""
    loaded = load(resolve_model(str(path)), EngineOptions(**(OPTIONS | options)))
    return Engine(loaded.runner, loaded.config)


class Run:
    """A request and everything the engine said of it."""

    def __init__(self, prompt: Sequence[int], *, n: int = 1, prefill_only: bool = False, **params: Any) -> None:
        self.events: list[Event] = []
        sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | params))
        self.request = Request("test", list(prompt), ROOT, sampling, n, self.events.append, prefill_only)

    def tokens(self, choice: int = 0) -> list[int]:
        failed = [event for event in self.events if isinstance(event, Failed)]
        assert not failed, failed
        return [e.sampled.token for e in self.events if isinstance(e, Token) and e.choice == choice]

    def logprobs(self, choice: int = 0) -> list[float | None]:
        return [e.sampled.logprob for e in self.events if isinstance(e, Token) and e.choice == choice]


def run_all(engine: Engine, *runs: Run) -> None:
    """Steps until nothing is left, then checks that every block came back."""
    for run in runs:
        engine.submit(run.request)
    while engine.step():
        engine.check()
    assert_empty(engine)


def assert_empty(engine: Engine) -> None:
    engine.check()
    load_now = engine.load()
    assert engine.blocks.num_held == 0, "blocks leaked"
    assert (load_now["num_running"], load_now["num_waiting"], load_now["reserved_blocks"]) == (0, 0, 0)
    assert (load_now["waiting_prefill_tokens"], load_now["waiting_prefill_attended"]) == (0, 0)
    assert not engine._books.ending, "a sequence that has ended is kept"
