"""The demo model that ships with the repository: complete, small, and made by the committed recipe."""

import importlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

MODELS = Path(__file__).parents[2] / "models"
DEMO = MODELS / "pagewire-demo"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The recipe's generator, whose modules stand beside each other and are no package."""
    monkeypatch.syspath_prepend(str(MODELS / "recipe"))
    before = set(sys.modules)
    yield importlib.import_module("corpus")
    for name in set(sys.modules) - before:  # forgotten again: their names are common ones
        del sys.modules[name]


def read(name: str) -> dict[str, Any]:
    return json.loads((DEMO / name).read_text(encoding="utf-8"))


def rendered(**context: Any) -> str:
    template = read("tokenizer_config.json")["chat_template"]
    return ImmutableSandboxedEnvironment().from_string(template).render(**context)


def test_directory_is_complete_and_small() -> None:
    assert all((DEMO / name).is_file() for name in FILES)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 20_000_000


def test_weights_are_bf16_and_fit_the_configuration() -> None:
    config = read("config.json")
    with safe_open(DEMO / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        embedding = weights.get_slice("model.embed_tokens.weight")
        assert embedding.get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) == 2 + 9 * config["num_hidden_layers"]  # embedding, final norm; the head is tied


def test_token_ids_agree(tokenizer: Tokenizer) -> None:
    config, generation = read("config.json"), read("generation_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert generation["eos_token_id"] == [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|eos|>")]
    assert read("special_tokens_map.json")["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "naïve café",
        "日本語の文",
        "👩‍👩‍👧 🦊",
        "\t a  b\r\n\n",
        "\x00\x7f",
        "12 + 345",
        "مرحبا",
    ],
)
def test_tokenizer_keeps_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_template_asks_for_an_answer() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert rendered(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_reads_parts_tools_and_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "<b>"}}}
    text = rendered(
        tools=[{"type": "function", "function": {"name": "f"}}],
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Go"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
        ],
    )
    assert text.startswith("<|im_start|>system\nBe kind.\n\nTools:\n{")
    assert '<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {' in text
    assert text.endswith("}\n</tool_call><|im_end|>\n<|im_start|>tool\n1<|im_end|>\n")


def test_template_is_the_recipes() -> None:
    source = (MODELS / "recipe" / "chat_template.jinja").read_text(encoding="utf-8")
    assert read("tokenizer_config.json")["chat_template"] == source.strip()


def test_template_writes_what_the_model_was_trained_on(corpus: ModuleType) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
    ]
    assert "".join(segment.text for segment in corpus.render(messages)) == rendered(messages=messages)


@pytest.mark.parametrize("long", [False, True])
def test_corpus_is_the_same_for_the_same_seed(corpus: ModuleType, long: bool) -> None:
    first, again, other = (list(islice(corpus.documents(seed, long), 50)) for seed in (7, 7, 8))
    assert first == again
    assert first != other
