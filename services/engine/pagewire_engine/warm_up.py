"""A few steps before the first request: the first ones of a process are many times slower than the rest.

They would be somebody's time to first token, and, measured, would make this worker look slow to the
router, which would then send it nothing that could correct the impression.
"""

from __future__ import annotations

import time

import structlog

from pagewire_engine.engine import Engine
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from pagewire_engine.step_cost import StepCost

log = structlog.get_logger(__name__)

_PROMPTS = (16, 64)  # tokens
_OUTPUT = 8
_BATCHES = (1, 4)  # sequences that decode together


def warm_up(engine: Engine) -> None:
    """Runs prompts and decode steps of two sizes twice; what remains is the second time's step costs."""
    started = time.perf_counter()
    for _ in range(2):
        engine.step_cost = StepCost()
        for length in _PROMPTS:
            for batch in _BATCHES:
                _run(engine, min(length, engine.config.max_model_len // 2), min(batch, engine.config.max_num_seqs))
    engine.blocks.reset_cache()
    engine.counters.reset()
    log.info("warmed up", seconds=round(time.perf_counter() - started, 2))


def _run(engine: Engine, length: int, batch: int) -> None:
    engine.blocks.reset_cache()  # a prefix hit would leave nothing to compute
    params = SamplingParams(seed=0, max_tokens=_OUTPUT, ignore_eos=True)
    engine.submit(Request("warm-up", [0] * max(length, 1), bytes(32), params, batch, lambda event: None))
    while engine.step():
        pass
