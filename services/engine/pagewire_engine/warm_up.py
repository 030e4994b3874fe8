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
_LEAST_PASSES, _MOST_PASSES, _ENOUGH_S = 2, 8, 0.3  # the first pass is only for warmth


def warm_up(engine: Engine) -> None:
    """Runs prompts and decode steps of two sizes several times; the step costs that remain are the cheapest pass's.

    What disturbs a measurement only adds to it, and with a few steps one disturbance would be most of the result.
    """
    started = time.perf_counter()
    passes: list[StepCost] = []
    while len(passes) < _LEAST_PASSES or (len(passes) < _MOST_PASSES and time.perf_counter() - started < _ENOUGH_S):
        engine.step_cost = StepCost(engine.config.attention_work)
        passes.append(engine.step_cost)
        for length in _PROMPTS:
            for batch in _BATCHES:
                _run(engine, min(length, engine.config.max_model_len // 2), min(batch, engine.config.max_num_seqs))
    engine.step_cost = min(passes[1:], key=_typical_ms)
    engine.blocks.reset_cache()
    engine.counters.reset()
    log.info("warmed up", seconds=round(time.perf_counter() - started, 2), passes=len(passes))


def _typical_ms(cost: StepCost) -> float:
    fit = cost.to_proto()
    prefill = fit.prefill_base_ms + _PROMPTS[-1] * fit.prefill_ms_per_token
    return prefill + fit.decode_base_ms + _BATCHES[-1] * fit.decode_ms_per_sequence


def _run(engine: Engine, length: int, batch: int) -> None:
    engine.blocks.reset_cache()  # a prefix hit would leave nothing to compute
    params = SamplingParams(seed=0, max_tokens=_OUTPUT, ignore_eos=True)
    engine.submit(Request("warm-up", [0] * max(length, 1), bytes(32), params, batch, lambda event: None))
    while engine.step():
        pass
