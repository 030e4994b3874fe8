"""Calls that a grammar forces: what a model with no idea writes, its family's parser reads, and it fits the schema."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakes import write_byte_tokenizer
from jsonschema import Draft202012Validator
from pagewire.v1.inference_pb2 import StructuredOutput
from pagewire_bridge.tools.calls import Arguments, Call, Piece, Tool, ToolFormat, joined
from pagewire_bridge.tools.families import TOOL_FORMATS
from pagewire_bridge.tools.form import output_with_tools
from pagewire_core.grammar import Vocabulary
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.structured_output import to_constraint

SPECIALS = ["<s>", "</s>", "<tool_call>", "[TOOL_CALLS]", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"]
EOS = 257
FAMILIES = ["deepseek_v3", "deepseek_v31", "hermes", "json", "llama3_json", "mistral", "qwen3_coder"]
TOOLS = [
    Tool("get_weather", parameters={
        "type": "object", "additionalProperties": False, "required": ["city", "days"],
        "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"$ref": "#/$defs/n"},
                       "units": {"type": "string", "enum": ["c", "f"]}},
        "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 30}},
    }),
    Tool("now", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
]  # fmt: skip


@pytest.fixture(scope="module", params=["marks are text", "marks are tokens"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools")
    write_byte_tokenizer(directory)
    if request.param == "marks are tokens":
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens(SPECIALS)
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write(path: Path, form: StructuredOutput | None, seed: int, wish: str = "", way_out: str = "") -> str:
    """What is written at random under the form, after `wish`. way_out: what ends free text, now and then."""
    assert form is not None
    tokenizer = Tokenizer(path)
    vocabulary = Vocabulary(path, tokenizer.vocab_size, [EOS])
    matcher = vocabulary.compile(to_constraint(form, None, tokenizer.special_tokens).answer)
    rng, mask, tokens = random.Random(seed), np.empty(vocabulary.num_words, np.uint32), list[int]()
    wished = tokenizer.encode(wish, False)
    while len(tokens) < 1500:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if not wished and way_out and len(allowed) > 150 and rng.random() < 0.2:
            wished = tokenizer.encode(way_out, False)
        token = wished.pop(0) if wished else EOS if EOS in allowed and rng.random() < 0.5 else rng.choice(allowed)
        assert token in allowed, tokenizer.decode(tokens, False)
        if token == EOS:
            return tokenizer.decode(tokens, skip_special_tokens=False)
        tokens.append(token)
        matcher.consume_token(token)
    raise AssertionError(f"no end: {tokenizer.decode(tokens, skip_special_tokens=False)}")


def calls_in(form: ToolFormat, text: str) -> list[tuple[str, Any]]:
    parser = form.parser(TOOLS)
    pieces: list[Piece] = joined([*parser.push(text), *parser.finish()])
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    arguments = [json.loads(piece.text) for piece in pieces if isinstance(piece, Arguments)]
    assert len(calls) == len(arguments) and len(calls) + len(arguments) == len(pieces), text
    return [(call.name, argument) for call, argument in zip(calls, arguments, strict=True)]


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v31", "hermes", "json", "llama3_json", "mistral", "qwen3_coder"]
)
def test_forced_calls_are_read_as_they_were_forced(path: Path, family: str) -> None:
    way_out = "\n</parameter>\n" if family.startswith("qwen3_") else ""
    form, schemas, seen = TOOL_FORMATS[family], {tool.name: tool.parameters for tool in TOOLS}, set()
    for parallel in (True, False):
        for seed in range(4):
            text = write(path, output_with_tools(None, form, TOOLS, "required", parallel), seed, way_out=way_out)
            calls = calls_in(form, text)
            assert calls and (parallel or len(calls) == 1)
            for name, arguments in calls:
                seen.add(name)
                if family.startswith("qwen3_") and name == "get_weather":
                    arguments["city"] = arguments["city"][:9]  # text between elements has no length
                Draft202012Validator(schemas[name]).validate(arguments)
    assert seen == schemas.keys()


@pytest.mark.parametrize("family", ["hermes", "qwen3_coder"])
def test_a_call_of_a_strict_tool_is_held_to_its_schema_once_it_begins(path: Path, family: str) -> None:
    form, strict = TOOL_FORMATS[family], [Tool(t.name, parameters=t.parameters, strict=True) for t in TOOLS]
    free = output_with_tools(None, form, strict, "auto", False)
    for seed in range(4):
        way_out = "\n</parameter>\n" if family == "qwen3_coder" else ""
        text = write(path, free, seed, "Let me see. <tool_call>", way_out)
        assert len(calls_in(form, text.removeprefix("Let me see. "))) == 1
    assert output_with_tools(None, form, TOOLS, "auto", True) is None


def test_an_answer_has_its_form_or_is_a_call(path: Path) -> None:
    wanted = StructuredOutput(json_schema='{"enum": ["yes", "no"]}')
    form = output_with_tools(wanted, TOOL_FORMATS["hermes"], TOOLS, "auto", False)
    assert write(path, form, 1, '"') in ('"yes"', '"no"')
    assert len(calls_in(TOOL_FORMATS["hermes"], write(path, form, 1, "<tool_call>"))) == 1
