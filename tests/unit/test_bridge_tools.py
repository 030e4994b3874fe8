"""Calls in a model's text, however it is cut: the pieces of a stream say what the whole text says."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.calls import Arguments, Call, Piece, Text, Tool, joined
from pagewire_bridge.tools.families import TOOL_FORMATS
from pagewire_core.flags import FLAGS

WEATHER = Tool("get_weather", parameters={
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["c", "f"]}},
})  # fmt: skip
NOW = Tool("now")
TOOLS = [WEATHER, NOW]
ROME = {"city": 'Rome }"] <｜tool▁call▁end｜>\n', "days": 3}
RAW = json.dumps(ROME, ensure_ascii=False)
B, E, CB, CE, SEP = (f"<｜tool▁{x}｜>" for x in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))


def said(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls as (name, arguments)); each call begins once, before its arguments, with an id of its own."""
    text, calls, ids = "", [], set()
    for piece in pieces:
        if isinstance(piece, Text):
            text += piece.text
        elif isinstance(piece, Call):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
            ids.add(piece.id)
        elif isinstance(piece, Arguments):
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    assert len(ids) == len(calls)
    return text, calls


def parsed(family: str, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = TOOL_FORMATS[family].parser(TOOLS)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return said([*pieces, *parser.finish()])


CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {RAW}}}\n</tool_call>', "", [("get_weather", RAW)]),
    ("hermes", f'Sure.\n\n<tool_call>{{"arguments": {RAW}, "name": "get_weather"}}</tool_call>\n<tool_call>\n'
               '{"name": "now"}</tool_call>\n', "Sure.", [("get_weather", RAW), ("now", "{}")]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(RAW)}}}</tool_call> Done. ', "Done. ",
     [("get_weather", RAW)]),
    ("hermes", "a < b and <tool_ c\n", "a < b and <tool_ c\n", []),
    ("hermes", "x <tool_call> not JSON </tool_call>", "x <tool_call> not JSON </tool_call>", []),
    ("hermes", 'x <tool_call>{"na', 'x <tool_call>{"na', []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [1, {"b": "}', "", [("now", '{"a": [1, {"b": "}')]),
    ("qwen3_coder", "Hm.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n"
                    "<parameter=days>\n3\n</parameter>\n<parameter=units>\n\"c\"\n</parameter>\n</function>\n"
                    "</tool_call>",
     "Hm.", [("get_weather", '{"city": "New\\nYork", "days": 3, "units": "c"}')]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", "{}")]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {RAW}}}', "", [("get_weather", RAW)]),
    ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {RAW}}}; '
                    '{"name": "now", "parameters": {}}', "", [("get_weather", RAW), ("now", "{}")]),
    ("llama3_json", '{"name": "Leo", "age": 27}', '{"name": "Leo", "age": 27}', []),
    ("llama3_json", '  {"city": "x"} ', '  {"city": "x"} ', []),
    ("llama3_json", "Hello {x}", "Hello {x}", []),
    ("json", f'[{{"name": "get_weather", "arguments": {RAW}}}, {{"name": "now", "arguments": {{}}}}]', "",
     [("get_weather", RAW), ("now", "{}")]),
    ("json", '{"type": "function", "name": "now", "arguments": {}}\n', "", [("now", "{}")]),
    ("json", '{"name": "now", "arguments": {}} and more', "and more", [("now", "{}")]),
    ("json", "[1, 2]", "[1, 2]", []),
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {RAW}}}, '
                '{"name": "now", "arguments": {}}]', "",
     [("get_weather", RAW), ("now", "{}")]),
    ("mistral", f"Ok [TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{RAW}[TOOL_CALLS]now{{}}", "Ok",
     [("get_weather", RAW), ("now", "{}")]),
    ("mistral", "see [TOOL] and [1]", "see [TOOL] and [1]", []),
    ("deepseek_v3", f"Ok{B}{CB}function{SEP}get_weather\n```json\n{RAW}\n```{CE}\n{CB}function{SEP}now\n```json\n{{}}\n"
                    f"```{CE}{E}",
     "Ok", [("get_weather", RAW), ("now", "{}")]),
    ("deepseek_v31", f"{B}{CB}get_weather{SEP}{RAW}{CE}{CB}now{SEP}{{}}{CE}{E}", "",
     [("get_weather", RAW), ("now", "{}")]),
    # Braces that were forgotten take nothing with them.
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {RAW}\n</tool_call>\n<tool_call>{{"name": "now"'
               "</tool_call> Done", "Done", [("get_weather", RAW), ("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [1</tool_call><tool_call>{"name": "now"}</tool_call>', "",
     [("now", '{"a": [1'), ("now", "{}")]),
    ("llama3_json", '{"name": "now", "parameters": {}; {"name": "now", "parameters": {} x', "x",
     [("now", "{}"), ("now", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}]Done', "Done", [("now", "{}")]),
    ("deepseek_v31", f'{B}{CB}get_weather{SEP}{{"days": 3{CE}{CB}now{SEP}{{}}{CE}{E}Done', "Done",
     [("get_weather", '{"days": 3'), ("now", "{}")]),
    # Neither do ends of values, of functions, or of calls.
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n<parameter=days>\n3\n</function>\n"
                    "</tool_call> Done", "Done", [("get_weather", '{"city": "Rome", "days": 3}')]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\n<b></function></b>\n</parameter>\n</tool_call>\n"
                    "<tool_call>\n<function=now>\n</tool_call>\nDone", "Done",
     [("now", '{"a": "<b></function></b>"}'), ("now", "{}")]),
    ("qwen3_coder", "<tool_call><function=now><parameter=a>\n1\n</tool_call>Done", "Done", [("now", '{"a": "1"}')]),
    ("hermes", '<tool_call>{"name": "now"}\n<tool_call>{"name": "now"} Then\n<tool_call>{"name": "now"}}</tool_call>'
               "Done", "ThenDone", [("now", "{}")] * 3),
    ("hermes", '<tool_call>{"name": "now"}\n\nDone. ', "Done. ", [("now", "{}")]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n<tool_call>\n<function=now>\n</function>\nDone", "Done",
     [("now", "{}")] * 2),
    # No arguments, and no name.
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"arguments": null, "name": "now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": nan}</tool_call>', "", [("now", "nan")]),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}} Done', "Done", [("now", "{}")]),
    ("mistral", "[TOOL_CALLS] [ARGS]{} Done", "[TOOL_CALLS] [ARGS]{} Done", []),
    ("mistral", "[TOOL_CALLS]\x85[ARGS]{} Done", "[TOOL_CALLS]\x85[ARGS]{} Done", []),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_a_familys_calls_are_found(family: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(family, [text]) == (content, calls)
    assert parsed(family, list(text)) == (content, calls)


@pytest.mark.parametrize("wrong", [None, 5, True, "x", ["x"], {"x": 1}])
@pytest.mark.parametrize("name", ["properties", "required", "enum"])
@pytest.mark.parametrize("family", sorted(TOOL_FORMATS))
def test_a_schema_that_is_none_is_no_fault_of_ours(family: str, name: str, wrong: object) -> None:
    """What of it has a form is told to the router, which says what is wrong with it."""
    inner: dict[str, Any] = {"type": "string", **({"enum": wrong} if name == "enum" else {})}
    parameters = {"type": "object", "properties": {"a": inner}, **({name: wrong} if name != "enum" else {})}
    form, tools = TOOL_FORMATS[family], [Tool("now", parameters=parameters)]
    assert json.dumps([form.forced(tools, True), form.free(tools, True)])
    text = "<tool_call><function=now><parameter=a>\n1\n</parameter></function></tool_call>"
    parser = form.parser(tools)
    assert said([*parser.push(text), *parser.finish()])


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "{", "}", '"name"', '"now"', ": ", '"arguments"', '"a\\"b"', "[", "]", ",", " ",
    "\n", "1", "[TOOL_CALLS]", "[ARGS]", "<function=", "<parameter=", "</parameter>", "</function>", ">", "now", ";",
    "<|python_tag|>",
    '{"name": "now", "arguments": {"x": [1]}}', B, E, CB, CE, SEP, "```json\n", "\n```", "<", "é", "\\",
])  # fmt: skip


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)), st.lists(FRAGMENTS, max_size=25).map("".join), st.lists(st.integers(0, 999))
)
def test_pieces_say_what_the_whole_says_whatever_the_text_and_its_cuts(family: str, text: str, cuts: list[int]) -> None:
    """Also for text that is no call, half a call or nonsense; nothing that is no call is lost but white space."""
    whole = parsed(family, [text])
    assert parsed(family, pieces_of(text, cuts)) == whole
    assert parsed(family, list(text)) == whole
    if not whole[1]:
        assert whole[0] == text


def test_neighbours_of_a_kind_are_one() -> None:
    call: Any = Call(0, "x", "now")
    assert joined([Text("a"), Text("b"), call, Arguments(0, "{"), Arguments(0, "}")]) == [
        Text("ab"), call, Arguments(0, "{}"),
    ]  # fmt: skip


def test_the_flags_know_all_families() -> None:
    assert set(FLAGS["tool-call-parser"].choices or ()) == TOOL_FORMATS.keys()
    assert set(FLAGS["reasoning-parser"].choices or ()) == REASONING_FORMATS.keys()
