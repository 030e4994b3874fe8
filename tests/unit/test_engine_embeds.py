"""Prompts that are computed for their hidden state, on every runner, beside others that generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import Run, assert_empty, make_engine
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens
from tiny_models import make_model, reference_greedy
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 9, 200, 17], [7], list(range(20, 110))]

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "compiled": lambda path: make_engine(path),
    "torch": lambda path: Engine(make_torch_runner(path), LIMITS),
    "gpu": lambda path: Engine(make_gpu_runner(path), LIMITS),
}


@pytest.mark.parametrize("runner", ENGINES)
def test_a_hidden_state_is_the_references_and_disturbs_no_token(runner: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama")
    engine = ENGINES[runner](path)
    embeds = [Run(prompt, prefill_only=True, embeds=True) for prompt in PROMPTS]
    writers = [Run(PROMPTS[2], max_tokens=6), Run(PROMPTS[0], max_tokens=6, logprobs=1)]
    for run in (*embeds, *writers):
        engine.submit(run.request)
    while engine.step():
        engine.check()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
    for run, prompt in zip(embeds, PROMPTS, strict=True):
        [first] = [event for event in run.events if isinstance(event, FirstTokens)]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(first.tokens[0].hidden, expected, atol=2e-4, rtol=2e-4)
        engine.cancel(run.request)
    for run in writers:
        assert run.tokens() == reference_greedy(path, run.request.prompt, 6)[0]
    assert_empty(engine)
