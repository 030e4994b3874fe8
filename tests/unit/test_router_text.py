"""Tokens of a prompt without generating: the same ones that a generation would use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_cli.serve import demo_model
from pagewire_core.errors import InvalidRequest, ModelNotFound
from pagewire_router.model import ServedModel, load_served_model
from pagewire_router.request import validate
from pagewire_router.text import detokenize, tokenize, tokenizer_info

CHAT = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Héllo 🙂")])


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(str(demo_model()), served_names="demo")


@pytest.mark.parametrize("prompt", [{"text": "Two words, 🙂"}, {"chat": CHAT}])
def test_tokens_are_those_that_a_generation_would_use(model: ServedModel, prompt: dict[str, object]) -> None:
    tokens = tokenize(inference_pb2.TokenizeRequest(**prompt), model).tokens
    valid = validate(inference_pb2.GenerateRequest(**prompt), model, 512)
    assert [t.id for t in tokens] == valid.prompt_ids


def test_tokens_are_bytes_and_places_of_the_text(model: ServedModel) -> None:
    response = tokenize(inference_pb2.TokenizeRequest(text="a fox 🙂!", with_offsets=True), model)
    assert b"".join(t.bytes for t in response.tokens).decode() == "a fox 🙂!"
    assert response.tokens[-1].end == len("a fox 🙂!")
    ids = [t.id for t in response.tokens]
    assert detokenize(inference_pb2.DetokenizeRequest(token_ids=ids), model).text == "a fox 🙂!"


def test_the_tokenizers_settings_have_the_template_that_is_served(model: ServedModel, tmp_path: Path) -> None:
    """Clients that make a tokenizer of it must get the prompts that this server makes."""
    told = json.loads(tokenizer_info(inference_pb2.TokenizerInfoRequest(), model).config_json)
    own = json.loads((demo_model() / "tokenizer_config.json").read_text())
    assert told == {"tokenizer_class": "PreTrainedTokenizerFast", **own, "chat_template": told["chat_template"]}
    assert "<|im_start|>" in told["chat_template"]
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}!")
    other = load_served_model(str(demo_model()), chat_template=str(tmp_path / "other.jinja"))
    told = json.loads(tokenizer_info(inference_pb2.TokenizerInfoRequest(), other).config_json)
    assert told["chat_template"] == "{{ messages[0].content }}!"
    with pytest.raises(ModelNotFound):
        tokenizer_info(inference_pb2.TokenizerInfoRequest(model="none"), model)


def test_bad_requests_are_refused(model: ServedModel) -> None:
    with pytest.raises(ModelNotFound):
        tokenize(inference_pb2.TokenizeRequest(model="none", text="x"), model)
    with pytest.raises(InvalidRequest):
        tokenize(inference_pb2.TokenizeRequest(), model)
    with pytest.raises(InvalidRequest):
        detokenize(inference_pb2.DetokenizeRequest(token_ids=[model.vocab_size]), model)


def test_a_prompt_is_cut_from_the_left_when_asked(model: ServedModel) -> None:
    ids = list(range(10, 30))
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), truncate_prompt_tokens=5)
    assert validate(request, model, 512).prompt_ids == ids[-5:]


def test_a_seed_of_the_router_makes_those_of_requests() -> None:
    """The same requests in the same order draw the same; what a request says itself takes none away."""

    def seeds(**given: int) -> list[int]:
        served, found = load_served_model(str(demo_model()), **given), []
        for seed in (None, 7, None, None):
            sampling = common_pb2.SamplingParams(seed=seed)
            found.append(
                validate(inference_pb2.GenerateRequest(text="hi", sampling=sampling), served, 64).sampling.seed
            )
        return found

    first = seeds(seed=3)
    assert first == seeds(seed=3) and first[1] == 7 and len(set(first)) == 4
    assert first != seeds(seed=4) and seeds()[0] != seeds()[0]


def test_the_demo_model_is_described_from_its_files(model: ServedModel) -> None:
    described = model.description
    assert (described.architecture, described.hidden_size, described.dtype) == ("llama", 192, "bfloat16")
    assert 2_000_000 < described.parameter_count < 3_000_000 and len(described.digest) == 32
