"""Calls that a grammar forces: what a model with no idea writes, its family's parser reads, and it fits the schema."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakes import write_byte_tokenizer
from jsonschema import Draft202012Validator
from pagewire.v1.inference_pb2 import StructuredOutput
from pagewire_bridge.tools.calls import Arguments, Call, Input, Piece, Text, Tool, ToolFormat, joined
from pagewire_bridge.tools.custom import custom_calls, parameters
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


SQL = Tool("sql", parameters=parameters("SQL"), custom=True, form={
    "type": "grammar", "grammar": 'start: "SELECT \\"" NAME ("\\",\\n\\"" NAME)* "\\"" ";\\n"?\nNAME: /[a-z]{1,4}/',
})  # fmt: skip
DATE = Tool(
    "date", parameters=parameters("a date"), custom=True, form={"type": "regex", "pattern": r'"[0-9]{2}/[0-9]{2}\n?'}
)
IS_SQL, IS_DATE = re.compile(r'SELECT "[a-z]{1,4}(",\n"[a-z]{1,4})*"(;\n)?'), re.compile(r'"[0-9]{2}/[0-9]{2}\n?')


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


def inputs_in(form: ToolFormat, tools: list[Tool], text: str, cut: int) -> list[tuple[str, str]]:
    """(tool, what it is given), of a text that comes in parts of `cut` characters."""
    parser = custom_calls(form.parser(tools), tools, form)
    parts = [text[i : i + cut] for i in range(0, len(text), cut)]
    pieces: list[Piece] = joined([*(piece for part in parts for piece in parser.push(part)), *parser.finish()])
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    given = {piece.index: piece.text for piece in pieces if isinstance(piece, Arguments | Input)}
    assert not any(isinstance(piece, Text) for piece in pieces), text
    assert {*given} <= {call.index for call in calls} and all(call.custom == (call.name != "now") for call in calls)
    return [(call.name, given.get(call.index, "")) for call in calls]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_custom_tool_is_given_a_text_that_follows_its_grammar(path: Path, family: str) -> None:
    """With its quotes and lines as they are, and whatever may follow a call in this family."""
    form, tools, seen = TOOL_FORMATS[family], [SQL, TOOLS[1], DATE], set()
    for parallel in (True, False):
        for seed in range(8):
            text = write(path, output_with_tools(None, form, tools, "required", parallel), seed + 8 * parallel)
            given = inputs_in(form, tools, text, 1 + seed)
            assert given and (parallel or len(given) == 1) and given == inputs_in(form, tools, text, 10_000)
            for name, said in given:
                seen.add(name)
                assert {"sql": IS_SQL, "date": IS_DATE, "now": re.compile(r"{\s*}")}[name].fullmatch(said), (name, said)
    assert seen == {"sql", "date", "now"}


@pytest.mark.parametrize("family", ["hermes", "qwen3_coder"])
def test_a_call_of_a_custom_tool_is_held_to_its_grammar_once_it_begins_and_ends_the_answer(
    path: Path, family: str
) -> None:
    form, before = TOOL_FORMATS[family], "Let me see. "
    for tools in ([SQL], [SQL, TOOLS[1]]):
        free = output_with_tools(None, form, tools, "auto", True)
        for seed in range(3):
            text = write(path, free, seed, before + form.text_mark(SQL))
            [(name, said)] = inputs_in(form, tools, text.removeprefix(before), 7)
            assert name == "sql" and IS_SQL.fullmatch(said)
        assert write(path, free, 0, "No. ", "</s>").startswith("No. "), "text alone may come as well"


@pytest.mark.parametrize("family", ["hermes", "json", "llama3_json", "mistral", "qwen3_coder", "deepseek_v31"])
@pytest.mark.parametrize("said", ['a "b"\n\\ü', "", "\ud83d\ude00"])
def test_what_a_model_gives_a_custom_tool_as_it_calls_others_is_the_text(path: Path, family: str, said: str) -> None:
    """Without a grammar, or where nothing holds the model to it."""
    said = said.encode("utf-16", "surrogatepass").decode("utf-16")
    form, tool = TOOL_FORMATS[family], Tool("say", parameters=parameters("anything"), custom=True)
    tag = form.forced([tool], False)
    begin, end = form.text_mark(tool).removesuffix("<text>\n"), "}" if family in ("json", "llama3_json") else ""
    if family == "qwen3_coder":
        call = f"{begin}<parameter=input>\n{said}\n</parameter>\n</function>\n</tool_call>"
    else:
        end = {
            "hermes": "}\n</tool_call>",
            "mistral": "}]",
            "deepseek_v31": "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        }.get(family, end)
        call = begin + json.dumps({"input": said}) + end
    assert tag and all(inputs_in(form, tools, call, cut) == [("say", said)] for cut in (1, 3, 999) for tools in (
        [tool], [tool, SQL]))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("{}", "{}"), ('{"patch": "x"}', '{"patch": "x"}'), ('"as it is"', "as it is"), ('{"input": 3}', '{"input": 3}'),
     ('{"a": [1], "input": "x", "b": "y"}', "x"), ('{"input": "lone \\ud83d."}', "lone \ufffd.")],
)  # fmt: skip
def test_what_is_no_object_with_an_input_is_the_input(arguments: str, said: str) -> None:
    form, tool = TOOL_FORMATS["hermes"], Tool("say", parameters=parameters("anything"), custom=True)
    call = f'<tool_call>{{"name": "say", "arguments": {arguments}}}</tool_call>'
    assert all(inputs_in(form, [tool], call, cut) == [("say", said)] for cut in (1, 4, 999))
