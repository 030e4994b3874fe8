"""Thoughts and answers apart, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire.v1.inference_pb2 import TokenText
from pagewire_bridge.answer_parser import AnswerParser
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.calls import Call, Text, Thought, Tool
from pagewire_bridge.tools.families import TOOL_FORMATS


def parsed(family: str, tail: str, parts: list[str]) -> tuple[str, str]:
    parser = AnswerParser(None, REASONING_FORMATS[family], tail)
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    assert all(piece.text for piece in pieces if isinstance(piece, Text | Thought))
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    return thoughts, "".join(piece.text for piece in pieces if isinstance(piece, Text))


CASES = [
    ("qwen3", "", "<think>\nhm, hm\n</think>\n\nYes. \n", ("hm, hm", "Yes. \n")),
    ("qwen3", "", " \n<think>a</think>b", ("a", "b")),
    ("qwen3", "", "<think>\n\n</think>\n\nb", ("", "b")),
    ("qwen3", "", " Yes <think> no", ("", " Yes <think> no")),
    ("qwen3", "", "<thin", ("", "<thin")),
    ("qwen3", "<|im_start|>assistant\n<think>\n", "a </thin b</think>c", ("a </thin b", "c")),
    ("qwen3", "<think>\n\n</think>\n\n", "c </think>", ("", "c </think>")),
    ("qwen3", "<think>", "never ends \n</thi", ("never ends \n</thi", "")),
    ("deepseek_r1", "<think>\n", "a\n\nb\n</think>\nc", ("a\n\nb", "c")),
    ("deepseek_r1", "", "a</think>c", ("a", "c")),
    ("deepseek_r1", "", "<think>a</think>c", ("a", "c")),
    ("deepseek_r1", "", "<b>a", ("<b>a", "")),
    ("mistral", "", "[THINK]a[/THINK]c", ("a", "c")),
]


@pytest.mark.parametrize(("family", "tail", "text", "expected"), CASES)
def test_thoughts_are_told_apart(family: str, tail: str, text: str, expected: tuple[str, str]) -> None:
    assert parsed(family, tail, [text]) == expected
    assert parsed(family, tail, list(text)) == expected


TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "th", "a", " ", "\n", "[THINK]", "[/THINK]", "é"]), max_size=14
)


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(REASONING_FORMATS)), st.sampled_from(["", "<think>\n", "</think>\n"]), TEXTS,
    st.lists(st.integers(0, 99)),
)  # fmt: skip
def test_pieces_say_what_the_whole_says(family: str, tail: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert parsed(family, tail, pieces) == parsed(family, tail, [text]) == parsed(family, tail, list(text))


def test_tokens_of_thoughts_are_counted_by_their_bytes() -> None:
    """Six, the one that completes the mark not among them, wherever text comes late or several tokens together."""
    tokens = [b"<think>", b"h\xc3", b"\xa9", b" ok", b"</", b"th", b"ink>", b"yes", b"</think>"]
    parser = AnswerParser(None, REASONING_FORMATS["qwen3"], "")
    parser.count([TokenText(bytes=token) for token in tokens[:3]])
    for token in tokens[3:]:
        parser.count([TokenText(bytes=token)])
    assert parser.num_thought == 6


def test_calls_come_after_thoughts_and_not_in_them() -> None:
    tools = TOOL_FORMATS["hermes"].parser([Tool("now")])
    parser = AnswerParser(tools, REASONING_FORMATS["qwen3"], "")
    call = '<tool_call>{"name": "now"}</tool_call>'
    pieces = [*parser.push(f"<think>{call}</think>\n{call}"), *parser.finish()]
    assert [type(piece) for piece in pieces[:2]] == [Thought, Call]
