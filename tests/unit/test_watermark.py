"""A watermark is found by a detector that we did not write, survives what moves a request, and is not there unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_engine.engine import Engine
from pagewire_engine.watermark import DELTA, GAMMA, KEY, add_watermark, green_tokens
from tiny_models import VOCAB, make_model
from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

PROMPT = [5, 9, 200, 17]
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "compiled": lambda path: make_engine(path),
    "torch": lambda path: Engine(make_torch_runner(path), LIMITS),
    "gpu": lambda path: Engine(make_gpu_runner(path), LIMITS),
}


def z_score(tokens: list[int]) -> float:
    """transformers' own detector; pairs of tokens that come again prove nothing, and count once."""
    config = WatermarkingConfig(GAMMA, DELTA, hashing_key=KEY, seeding_scheme="lefthash", context_width=1)
    detector = WatermarkDetector(
        LlamaConfig(vocab_size=VOCAB, bos_token_id=1), "cpu", config, ignore_repeated_ngrams=True
    )
    return float(detector(torch.tensor([tokens]), return_dict=True).z_score[0])


def writer(seed: int = 1, **params: Any) -> Run:
    return Run(PROMPT, **{"max_tokens": 200, "temperature": 1.0, "seed": seed, "ignore_eos": True} | params)


@pytest.mark.parametrize("runner", ENGINES)
def test_a_detector_finds_it_and_nothing_where_there_is_none(runner: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama")
    marked, plain = writer(watermark=True), [writer(), writer(2)]
    greedy = writer(watermark=True, temperature=0.0)
    run_all(ENGINES[runner](path), marked, greedy, *plain)
    assert z_score([PROMPT[-1], *marked.tokens()]) > 4
    assert all(z_score([PROMPT[-1], *run.tokens()]) < 3 for run in plain)
    assert greedy.tokens() != plain[0].tokens()


def test_half_of_the_vocabulary_is_green_and_the_token_before_decides_which() -> None:
    logits = torch.zeros(VOCAB)
    add_watermark(logits, 7)
    assert sorted(green_tokens(7, VOCAB).tolist()) == logits.nonzero()[:, 0].tolist()
    assert logits.unique().tolist() == [0.0, DELTA] and (logits > 0).sum() == VOCAB // 2
    assert green_tokens(7, VOCAB).tolist() != green_tokens(8, VOCAB).tolist()
    # Golden: another version's worker must go on with the same watermark.
    assert green_tokens(7, VOCAB)[:5].tolist() == [249, 276, 294, 168, 274]


@pytest.mark.parametrize("params", [{"watermark": True}, {"typical_p": 0.7}, {"watermark": True, "typical_p": 0.5}])
def test_whoever_goes_on_chooses_the_same_tokens(params: dict[str, Any], tmp_path: Path) -> None:
    """A preempted request, and one that another worker resumes after some of its output."""
    path = make_model(tmp_path / "model", "llama")
    expected = writer(max_tokens=40, logprobs=1, **params)
    run_all(make_engine(path), expected)
    crowded = make_engine(path, kv_cache_memory_bytes=16 * 16 * 3 * 2 * 16 * 4)  # 16 pages of one kv head
    runs = [writer(seed, max_tokens=40, **params) for seed in (1, 1, 1, 2, 3, 4, 5, 6)]
    run_all(crowded, *runs)
    assert crowded.counters.preemptions
    assert all(run.tokens() == expected.tokens() for run in runs[:3])
    engine, rest = make_engine(path), writer(max_tokens=40, **params)
    engine.resume(rest.request, [expected.tokens()[:13]])
    while engine.step():
        engine.check()
    assert rest.tokens() == expected.tokens()[13:]
