"""A model that computes what are no numbers, as an overflow does: who asked for it fails, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed
from safetensors.torch import load_file, save_file
from tiny_models import make_model

BROKEN = 77  # the token whose embedding is none

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "compiled": lambda path: make_engine(path, dtype="float32"),
    "torch": lambda path: Engine(make_torch_runner(path), LIMITS),
    "gpu": lambda path: Engine(make_gpu_runner(path), LIMITS),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("broken"), "llama")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("made_by", ENGINES)
@pytest.mark.parametrize(
    "asked",
    [
        {}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 4, "top_p": 0.8}, {"logprobs": 2}, {"n": 2},
        {"repetition_penalty": 1.3}, {"typical_p": 0.5, "temperature": 1.0}, {"prefill_only": True},
        {"prefill_only": True, "embeds": True},
    ],
    ids=str,
)  # fmt: skip
def test_only_who_asked_for_it_fails(path: Path, made_by: str, asked: dict[str, Any]) -> None:
    alone, beside = Run([5, 6, 7], max_tokens=20), Run([5, 6, 7], max_tokens=20)
    engine = ENGINES[made_by](path)
    run_all(engine, alone)
    engine.submit(beside.request)
    engine.step()
    engine.step()
    broken = Run([8, BROKEN, 9], **asked)
    run_all(engine, broken)
    [failed] = [event for event in broken.events if isinstance(event, Failed)]
    assert failed.error.message.startswith("the model's logits are not numbers")
    assert broken.events[-1] is failed and beside.tokens() == alone.tokens()


@pytest.mark.parametrize("made_by", ENGINES)
def test_an_answer_that_comes_to_it_ends_there(path: Path, made_by: str) -> None:
    """On a GPU the step after that is under way by then."""
    engine, beside = ENGINES[made_by](path), Run([5, 6, 7], max_tokens=20)
    answer = Run([8, 9], max_tokens=20, logit_bias={BROKEN: 200.0})
    run_all(engine, beside, answer)
    assert isinstance(answer.events[-1], Failed) and len(beside.tokens()) == 20


@pytest.mark.parametrize("made_by", ENGINES)
def test_the_last_token_of_a_block_breaks_no_other_choice(path: Path, made_by: str) -> None:
    """Both come to it in one step: the second one's blocks are gone with the first."""
    engine = ENGINES[made_by](path)
    answers = Run(range(20, 35), n=2, logit_bias={BROKEN: 200.0})
    run_all(engine, answers)
    assert isinstance(answers.events[-1], Failed)


@pytest.mark.parametrize("made_by", ENGINES)
def test_a_prompt_of_whole_blocks_whose_tokens_are_scored_fails_alone(path: Path, made_by: str) -> None:
    engine, prompt = ENGINES[made_by](path), Run([8, BROKEN, *range(20, 50)])
    prompt.request.prompt_logprobs = 1
    run_all(engine, prompt)
    assert isinstance(prompt.events[-1], Failed)


@pytest.mark.parametrize("made_by", ENGINES)
@pytest.mark.parametrize("row", [3, 16, 319])
@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3}, {"logprobs": 1}], ids=str
)
def test_one_logit_that_is_none_is_enough(made_by: str, row: int, asked: dict[str, Any], tmp_path: Path) -> None:
    """Whatever it is compared with, the greatest of the others may be lost: 16 stands beside 0 in a vector."""
    path = make_model(tmp_path, "llama", num_hidden_layers=1)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][row] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    run = Run([5, 6, 7], **asked)
    run_all(ENGINES[made_by](path), run)
    assert isinstance(run.events[-1], Failed)


@pytest.mark.parametrize("made_by", ENGINES)
@pytest.mark.parametrize(
    "drawn",
    [
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}, {"temperature": 0.8, "top_p": 0.5},
        {"temperature": 0.8, "min_p": 0.1}, {"temperature": 0.8, "typical_p": 0.5}, {"logprobs": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_excludes_every_token_fails_alone(path: Path, made_by: str, drawn: dict[str, Any]) -> None:
    """A penalty may make the only token that is allowed impossible; none that is excluded comes in its place."""
    engine, beside = ENGINES[made_by](path), Run([5, 6, 7], max_tokens=20)
    asked = {"allowed_token_ids": frozenset({7}), "logit_bias": {7: -100.0}, "repetition_penalty": 3e38}
    run = Run([5, 6, 7], **asked, **drawn)
    run_all(engine, beside, run)
    failed = run.events[-1]
    assert isinstance(failed, Failed) and "the request excludes every token" in failed.error.message
    assert len(beside.tokens()) == 20
