"""Streams are read line by line by clients who do not agree on what ends a line."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pagewire_bridge.ollama.answer import line
from pagewire_bridge.sse import event

ENDS = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\r\n"
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ENDS)))


@given(texts)
@example(ENDS)
def test_an_event_is_one_line_whatever_the_model_says(text: str) -> None:
    """httpx, and who reads lines by it, ends one at U+0085, U+2028 and U+2029, which JSON may have as they are."""
    stream = httpx.Response(200, content=event({"text": text}) + event({"text": text}, "delta"))
    lines = list(stream.iter_lines())
    assert [words for words in lines if not words.startswith("data: ")] == ["", "event: delta", ""]
    told = [json.loads(words.removeprefix("data: ")) for words in lines if words.startswith("data: ")]
    assert told == [{"text": text}] * 2


@given(texts)
@example(ENDS)
def test_a_line_of_ollama_is_one(text: str) -> None:
    stream = httpx.Response(200, content=line({"response": text}) * 2)
    assert [json.loads(words) for words in stream.iter_lines()] == [{"response": text}] * 2


@pytest.mark.parametrize("text", ["é", "日本", "\u2027\u202a", "\\u2028", "\x84\x86"])
def test_nothing_else_is_escaped(text: str) -> None:
    assert (
        event({"text": text})
        == f"data: {json.dumps({'text': text}, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
    )
