"""What requests get that do not say how tokens are chosen: --generation-config and --override-generation-config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from fakes import make_model, write_byte_tokenizer
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import ContextLength, StartupError
from pagewire_router.grammars import Grammars, constrain
from pagewire_router.model import ServedModel, load_served_model
from pagewire_router.request import ValidRequest, validate
from pagewire_router.sampling_defaults import FILE, tell

LIMIT = 100
OF_MODEL = {
    "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "repetition_penalty": 1.1, "do_sample": True,
    "eos_token_id": [7, 9], "transformers_version": "4.51.0",
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", vocab_size=258)
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / FILE).write_text(json.dumps(OF_MODEL))
    return tmp_path / "model"


def load(directory: Path, source: str = "auto", override: object = None) -> ServedModel:
    text = json.dumps(override) if override is not None else None
    return load_served_model(str(directory), generation_config=source, override_generation_config=text)


def ask(model: ServedModel, heeds: bool = True, default_length: bool = False, **sampling: Any) -> ValidRequest:
    request = inference_pb2.GenerateRequest(
        text="hello", sampling=common_pb2.SamplingParams(**sampling), model_sampling_defaults=heeds,
        completion_default_length=default_length,
    )  # fmt: skip
    return validate(request, model, LIMIT)


def chosen(valid: ValidRequest) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {n: round(getattr(valid.sampling, n), 6) for n in names if valid.sampling.HasField(n)}


def test_the_models_file_says_what_requests_do_not(directory: Path) -> None:
    """OpenAI's and Anthropic's routes ask for it; TGI's, Ollama's and native clients have their own defaults."""
    model = load(directory)
    assert chosen(ask(model)) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    said = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert chosen(ask(model, **said)) == said
    assert chosen(ask(model, top_k=-1)) == {**chosen(ask(model)), "top_k": -1}
    assert chosen(ask(model, heeds=False)) == {}
    assert ask(model).sampling.max_tokens == LIMIT - 5 and model.eos_token_ids == (7, 9, 257)


def test_the_file_may_be_left_out_or_be_another_folders(directory: Path, tmp_path: Path) -> None:
    without = load(directory, "vllm")
    assert chosen(ask(without)) == {} and without.eos_token_ids == (7, 9, 257)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_text(json.dumps({"top_k": 3, "max_new_tokens": 8, "eos_token_id": 5}))
    other = load(directory, str(tmp_path / "other"))
    assert chosen(ask(other)) == {"top_k": 3} and other.eos_token_ids == (5, 257)
    assert ask(other).sampling.max_tokens == ask(other, max_tokens=50).sampling.max_tokens == 8
    (directory / FILE).unlink()
    assert chosen(ask(load(directory))) == {}


async def test_a_complete_text_ends_as_workers_have_it_whatever_folder_the_router_has(
    directory: Path, tmp_path: Path
) -> None:
    """Their masks allow the ends of the model's own files alone: none of these was one, and it went on to its limit."""
    (tmp_path / FILE).write_text(json.dumps({"eos_token_id": 5}))
    model = load(directory, str(tmp_path))
    grammars = Grammars(directory, 258, model.eos_token_ids)
    request = inference_pb2.GenerateRequest(structured_output=inference_pb2.StructuredOutput(regex="a+"))
    free, valid = ask(model), ask(model)
    await constrain(valid, request, grammars, model.own_eos_token_ids)
    await grammars.close()
    assert list(free.sampling.eos_token_ids) == [5, 257] and list(valid.sampling.eos_token_ids) == [5, 257, 7, 9]


def test_what_the_operator_says_wins_and_null_takes_away(directory: Path) -> None:
    model = load(directory, override={"temperature": 0, "top_p": None, "min_p": 0.25})
    expected = {"temperature": 0.0, "top_k": 20, "min_p": 0.25, "repetition_penalty": 1.1}
    assert chosen(ask(model)) == expected
    assert chosen(ask(load(directory, "vllm", {"min_p": 0.25}))) == {"min_p": 0.25}


def test_the_models_length_is_a_default_and_the_operators_a_bound(directory: Path) -> None:
    """As in vLLM. What does not fit beside the prompt is an error only if the client asked for it."""
    for given in (10, 2**32 - 1):
        (directory / FILE).write_text(json.dumps({"max_new_tokens": given}))
        model = load(directory)
        assert ask(model).sampling.max_tokens == min(given, LIMIT - 5)
        assert ask(model, max_tokens=50).sampling.max_tokens == 50
        assert ask(model, default_length=True).sampling.max_tokens == 16
        assert ask(model, heeds=False).sampling.max_tokens == LIMIT - 5
        with pytest.raises(ContextLength):
            ask(model, max_tokens=LIMIT)
    bounded = load(directory, override={"max_new_tokens": 7})
    for valid in (ask(bounded), ask(bounded, max_tokens=50), ask(bounded, default_length=True)):
        assert valid.sampling.max_tokens == 7
    assert ask(bounded, max_tokens=3).sampling.max_tokens == 3
    assert ask(bounded, heeds=False, max_tokens=50).sampling.max_tokens == 50


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ([1], "is no JSON object"),
        ({"typical_p": 0.5}, "typical_p is none of temperature, top_p"),
        ({"temperature": -1}, "--override-generation-config: temperature cannot be -1"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"top_p": 0}, "top_p cannot be 0"),
        ({"top_k": 1.5}, "top_k cannot be 1.5"),
        ({"top_k": 2**40}, "top_k cannot be"),
        ({"min_p": True}, "min_p cannot be True"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0"),
    ],
)
def test_what_makes_no_sense_ends_the_start_with_a_sentence(directory: Path, override: object, words: str) -> None:
    with pytest.raises(StartupError) as caught:
        load(directory, override=override)
    assert words in str(caught.value)


def test_a_file_that_makes_no_sense_is_named_and_a_folder_must_have_one(directory: Path, tmp_path: Path) -> None:
    (directory / FILE).write_text(json.dumps({"top_p": 1.5}))
    with pytest.raises(StartupError, match=r"generation_config\.json: top_p cannot be 1\.5"):
        load(directory)
    assert load(directory, "vllm") and load(directory, override={"top_p": None})
    with pytest.raises(StartupError, match=r"there is no generation_config\.json"):
        load(directory, str(tmp_path))


def test_the_log_says_what_is_in_force_unless_it_is_what_everybody_expects(directory: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        tell(load(directory, override={"max_new_tokens": 9}).sampling_defaults)
        tell(dataclasses.replace(load(directory, "vllm")).sampling_defaults)
    [of_model] = lines
    assert of_model["log_level"] == "warning" and "--generation-config vllm" in of_model["event"]
    assert (of_model["temperature"], of_model["top_k"], of_model["most_tokens"]) == (0.6, 20, 9)
