"""--speculative-config as vLLM writes it, --speculate as TGI does, and one sentence for everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pagewire_core.errors import StartupError
from pagewire_engine.speculative.config import SpeculativeConfig, read_speculative_config


def _read(**given: Any) -> SpeculativeConfig | None:
    return read_speculative_config(json.dumps(given), None)


def test_without_flags_there_is_no_speculation() -> None:
    assert read_speculative_config(None, None) is None


def test_speculate_is_prompt_lookup_with_that_many_tokens() -> None:
    config = read_speculative_config(None, 4)
    assert config is not None
    assert (config.method, config.num_speculative_tokens) == ("ngram", 4)


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 3}, (3, 3)),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 2}, (4, 2)),
        ({"prompt_lookup_max": None, "prompt_lookup_min": None}, (5, 5)),
    ],
)
def test_lookup_lengths_default_as_in_vllm(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    config = _read(method="ngram", num_speculative_tokens=4, **given)
    assert config is not None and (config.prompt_lookup_max, config.prompt_lookup_min) == lengths


@pytest.mark.parametrize("given", [{"method": "draft_model", "model": "org/draft"}, {"model": "org/draft"}])
def test_a_model_is_a_draft_model_with_or_without_the_method(given: dict[str, Any]) -> None:
    config = _read(num_speculative_tokens=3, disable_by_batch_size=8, **given)
    assert config == SpeculativeConfig("draft_model", 3, model="org/draft", disable_by_batch_size=8)


def test_the_older_spelling_of_prompt_lookup_is_understood() -> None:
    assert _read(model="[ngram]", num_speculative_tokens=2) == _read(method="ngram", num_speculative_tokens=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'method': 'ngram'}", "is not JSON"),
        ('["ngram"]', "must be a JSON object, not list"),
        ("{}", "names no method; supported are ngram and draft_model"),
        ('{"method": "eagle3", "num_speculative_tokens": 2}', "method 'eagle3'; supported are ngram and draft_model"),
        ('{"method": "ngram"}', "lacks num_speculative_tokens"),
        ('{"method": "draft_model", "num_speculative_tokens": 2}', "needs model"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "must be positive"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "must be an integer, not True"),
        ('{"method": "ngram", "num_speculative_tokens": "4"}', "must be an integer, not '4'"),
        ('{"method": "ngram", "num_speculative_tokens": 2.5}', "must be an integer, not 2.5"),
        ('{"model": 3, "num_speculative_tokens": 2}', "must be a string, not 3"),
        ('{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_mx": 3}', "unknown key 'prompt_lookup_mx'"),
        ('{"method": "ngram", "model": "a/b", "num_speculative_tokens": 2}', "'model' has no meaning"),
        ('{"model": "a/b", "prompt_lookup_max": 3, "num_speculative_tokens": 2}', "'prompt_lookup_max' has no meaning"),
        (
            '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
            "prompt_lookup_min 3 is more than prompt_lookup_max 2",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(StartupError, match="--speculative-config") as raised:
        read_speculative_config(text, None)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_both_flags_at_once_contradict_each_other() -> None:
    with pytest.raises(StartupError, match="--speculate contradict"):
        read_speculative_config('{"method": "ngram", "num_speculative_tokens": 2}', 2)
