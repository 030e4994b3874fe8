"""Prompts that are computed for their hidden state, on every runner, beside others that generate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import Run, assert_empty, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_core.errors import StartupError
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens
from tiny_models import make_model, reference_greedy
from transformers import AutoModel, AutoModelForCausalLM

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


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])  # a window, tied to the embedding, neither
def test_a_model_that_was_saved_without_a_head_embeds_as_the_whole_one(architecture: str, tmp_path: Path) -> None:
    """Embedding models of the Hub are such: e5-mistral, Qwen3-Embedding."""
    whole, base = make_model(tmp_path / "whole", architecture), tmp_path / "base"
    shutil.copytree(whole, base)
    AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(base)
    vectors = []
    for path in (whole, base):
        engine, run = make_engine(path), Run(PROMPTS[2], prefill_only=True, embeds=True)
        engine.submit(run.request)
        while engine.step():
            engine.check()
        vectors += [event.tokens[0].hidden for event in run.events if isinstance(event, FirstTokens)]
    torch.testing.assert_close(*vectors, atol=0, rtol=0)


def test_a_model_without_a_head_generates_where_it_is_tied_to_the_embedding(tmp_path: Path) -> None:
    path, run = make_model(tmp_path, "qwen2"), Run(PROMPTS[0])
    AutoModel.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    run_all(make_engine(path), run)
    assert run.tokens() == reference_greedy(path, PROMPTS[0], 12)[0]


def test_an_embedding_model_whose_vectors_are_no_last_tokens_is_refused(tmp_path: Path) -> None:
    path, pooling = make_model(tmp_path, "qwen3"), tmp_path / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    last = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    pooling.write_text(json.dumps({**last, "include_prompt": True}))
    make_engine(path)
    for other in (
        {**last, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False},
        {"pooling_mode": "mean"},
    ):
        pooling.write_text(json.dumps(other))
        with pytest.raises(StartupError, match="by pooling mean"):
            make_engine(path)
