"""Forms in the words of other servers and times: vLLM's `guided_*`, TGI's and llama.cpp's kinds of `response_format`.

They ask for the same as OpenAI's and as `structured_outputs`, and mistakes are told by the name that was sent.
"""

from __future__ import annotations

from typing import Any

import pytest
from pagewire_core.errors import InvalidRequest
from scripted_router import Bridge, refuses

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("older", "form"),
    [
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": '{"type": "string"}'}, {"json": '{"type": "string"}'}),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, {"json": SCHEMA, "whitespace_pattern": " ?"}),
        ({"guided_regex": "[a-f]+"}, {"regex": "[a-f]+"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"guided_grammar": 'root ::= "x"'}, {"grammar": 'root ::= "x"'}),
    ],
)
async def test_an_older_name_asks_for_the_same(bridge: Bridge, older: dict[str, Any], form: dict[str, Any]) -> None:
    for ask in (bridge.chat, bridge.complete):
        answers = [await ask(**older), await ask(structured_outputs=form)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert "x-pagewire-ignored-fields" not in answers[0].headers
        by_older, by_form = bridge.router.requests[-2:]
        assert by_older.structured_output == by_form.structured_output
        assert by_older.HasField("structured_output")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
        ({"guided_json": {}, "structured_outputs": {"regex": "a"}}, "guided_json"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"guided_choice": "yes"}, "guided_choice"),
    ],
)
async def test_two_forms_or_a_bad_one_are_refused(bridge: Bridge, fields: dict[str, Any], param: str) -> None:
    refused = await bridge.complete(**fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert not bridge.router.requests


async def test_plain_text_is_no_other_form(bridge: Bridge) -> None:
    assert (await bridge.chat(guided_choice=["yes"], response_format={"type": "text"})).status_code == 200
    assert list(bridge.router.requests[0].structured_output.choice.texts) == ["yes"]


async def test_a_form_that_the_router_refuses_is_told_by_the_name_that_was_sent(bridge: Bridge) -> None:
    bridge.router.script = refuses(InvalidRequest("the regex is too large", "structured_outputs"))
    refused = await bridge.chat(guided_regex="(a{1000}){1000}")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "guided_regex"


@pytest.mark.parametrize(
    ("format_", "form"),
    [
        ({"type": "json", "value": SCHEMA}, {"json": SCHEMA}),
        ({"type": "json_object", "value": SCHEMA}, {"json": SCHEMA}),
        ({"type": "json_object", "value": '{"type": "string"}'}, {"json": '{"type": "string"}'}),
        ({"type": "json_schema", "value": {"name": "place", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"type": "regex", "value": "[a-f]+"}, {"regex": "[a-f]+"}),
        ({"type": "json_object", "schema": SCHEMA}, {"json": SCHEMA}),
    ],
)
async def test_a_response_format_of_tgi_or_llama_cpp(
    bridge: Bridge, format_: dict[str, Any], form: dict[str, Any]
) -> None:
    assert (await bridge.chat(response_format=format_)).status_code == 200
    assert (await bridge.chat(structured_outputs=form)).status_code == 200
    by_value, by_form = bridge.router.requests
    assert by_value.structured_output == by_form.structured_output


@pytest.mark.parametrize(
    "format_",
    [
        {"type": "json"}, {"type": "regex"}, {"type": "regex", "value": SCHEMA}, {"type": "text", "value": "x"},
        {"type": "json_schema", "value": SCHEMA, "json_schema": {"schema": SCHEMA}}, {"type": "json", "schema": SCHEMA},
        {"type": "json_object", "value": SCHEMA, "schema": SCHEMA},
    ],
)  # fmt: skip
async def test_a_value_that_does_not_fit_is_refused(bridge: Bridge, format_: dict[str, Any]) -> None:
    refused = await bridge.chat(response_format=format_)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format.value"


async def test_a_schema_is_for_json_objects_alone(bridge: Bridge) -> None:
    refused = await bridge.chat(response_format={"type": "text", "schema": SCHEMA})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format.schema"
