"""Decoding beside long prompts, with a runner whose steps take as long as their rows, by a clock that they move."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from engines import Run, assert_empty
from hash_model import HashRunner, Step, expected
from pagewire_engine.batch import Batch
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Token

_MS_PER_ROW = 0.05
_DELAY_MS = 8.0  # 160 rows
_LONG = 1500


class Clock:
    """A busy machine holds up steps for as long as they take."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Paced(HashRunner):
    """Each row takes its time, each step a little more."""

    def launch(self, batch: Batch) -> Step:
        time.perf_counter.now += (1.0 + _MS_PER_ROW * len(batch.input_ids)) / 1e3  # type: ignore[attr-defined]
        return super().launch(batch)


def engine_of(delay_ms: float) -> Engine:
    config = EngineConfig(2048, 16, 400, 8, 2048, max_prefill_delay_ms=delay_ms)
    engine = Engine(Paced(400, 16), config)
    for length in (16, 200, 16, 200):  # what warming up teaches
        engine.submit(Run([length] * length, max_tokens=6).request)
        while engine.step():
            pass
    return engine


def worst_gap_ms(delay_ms: float) -> tuple[float, int]:
    """The longest that a decoding sequence waits for a token while a long prompt comes, and the prompt's steps."""
    engine = engine_of(delay_ms)
    times: list[float] = []

    def emit(event: Event) -> None:
        if isinstance(event, Token):
            times.append(time.perf_counter())

    decoding, prompt = Run([1, 2], max_tokens=120), Run([i % 5 for i in range(_LONG)], max_tokens=1)
    decoding.request.emit = emit
    engine.submit(decoding.request)
    for _ in range(5):
        engine.step()
    engine.submit(prompt.request)
    before = engine.counters.steps
    while not prompt.tokens():
        engine.step()
    num_steps = engine.counters.steps - before
    while engine.step():
        pass
    assert_empty(engine)
    assert prompt.tokens() == expected(prompt.request.prompt, prompt.request.params, 0, 2048)
    return max(later - earlier for earlier, later in pairwise(times)) * 1e3, num_steps


def test_a_long_prompt_delays_a_decode_step_by_no_more_than_the_budget() -> None:
    """1500 tokens at once take 75 ms; in chunks of 8 ms nobody waits for long, and the prompt still gets on."""
    unlimited, at_once = worst_gap_ms(0.0)
    assert at_once == 1 and unlimited > _LONG * _MS_PER_ROW
    chunked, num_steps = worst_gap_ms(_DELAY_MS)
    assert _LONG / (_DELAY_MS / _MS_PER_ROW) - 1 <= num_steps < -(-_LONG // 16), "no more than a block a step"
    assert chunked < 3 * _DELAY_MS + 2


def test_a_prompt_gets_on_by_a_block_a_step_even_where_the_budget_has_no_room_for_it() -> None:
    _, num_steps = worst_gap_ms(0.001)
    assert num_steps == -(-_LONG // 16)
