"""Calls in chats, for templates that want them otherwise than OpenAI's clients send them."""

from __future__ import annotations

from typing import Any

import pytest
from pagewire_core.chat_template import ChatTemplate

ONE, TWO = "call_0123456789abcdef01234567", "toolu_vrtx_01-ABC"
LONG, SHORT = {"id": ONE}, {"id": "abcDEF123"}


def call(name: str, **rest: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": "Malmö"}}, **rest}


def chat(one: dict[str, str], two: dict[str, str]) -> list[dict[str, Any]]:
    """With ids or without; the results in the order of the calls."""
    results = [{"tool_call_id": ids["id"]} if ids else {} for ids in (one, two)]
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call("near", **one), call("far", **two)]},
        {"role": "tool", "content": "here", **results[0]},
        {"role": "tool", "content": "there", **results[1]},
    ]


def template(of_call: str, of_result: str) -> ChatTemplate:
    return ChatTemplate(
        "{% for m in messages %}{% for call in m.tool_calls %}" + of_call + ";{% endfor %}"
        "{% if m.role == 'tool' %}" + of_result + ";{% endif %}{% endfor %}"
    )


NINE = "{% if ID is not defined or ID | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ ID }}"
MISTRAL = template(NINE.replace("ID", "call.id"), NINE.replace("ID", "m.tool_call_id"))


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ((LONG, SHORT), ["f01234567", "abcDEF123"]),
        (({"id": TWO}, {"id": "x"}), ["vrtx01ABC", "00000000x"]),
        (({}, {}), ["00call1x0", "00call1x1"]),
    ],
)
def test_ids_have_nine_characters_where_the_template_refuses_others(
    ids: tuple[dict[str, str], dict[str, str]], told: list[str]
) -> None:
    assert MISTRAL.render(chat(*ids)).split(";")[:-1] == told * 2


def test_results_name_their_tool_where_the_template_asks_for_it() -> None:
    """Hermes 2 Pro's."""
    named = template("", "{{ m.name if m.name is defined else raise_exception('name') }}={{ m.content }}")
    for ids in ((LONG, SHORT), ({}, {})):
        assert named.render(chat(*ids)) == ";;near=here;far=there;"


def test_arguments_are_text_where_the_template_takes_them_so() -> None:
    """DeepSeek R1's."""
    text = template("{{ call.function.name + call.function.arguments }}", "{{ m.content }}")
    assert text.render(chat(LONG, SHORT)) == 'near{"city": "Malmö"};far{"city": "Malmö"};here;there;'


def test_a_template_that_takes_calls_as_they_are_gets_them_so() -> None:
    plain = template("{{ call.id }} {{ call.function.arguments | tojson }}", "{{ m.name is defined }}")
    told = plain.render(chat(LONG, {"id": TWO}))
    assert told == f'{ONE} {{"city": "Malmö"}};{TWO} {{"city": "Malmö"}};False;False;'
