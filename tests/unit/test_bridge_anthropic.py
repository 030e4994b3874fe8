"""What coding agents send to Anthropic's route, and what becomes of it in the chat that is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pagewire_bridge.answer_parser import NO_FORMAT
from pagewire_bridge.anthropic.schema import MessagesBody
from pagewire_bridge.anthropic.translate import ignored_fields, to_chat_body
from pagewire_bridge.body import validated
from pagewire_bridge.openai.schema import ChatBody
from pagewire_core.errors import InvalidRequest

ANSWERS = NO_FORMAT.with_tools
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "now", "input_schema": {"type": "object"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def body(*messages: dict[str, Any], **fields: Any) -> MessagesBody:
    return validated(MessagesBody, {"model": "m", "max_tokens": 9, "messages": [*messages] or [USER], **fields})


def chat(*messages: dict[str, Any], **fields: Any) -> ChatBody:
    return to_chat_body(body(*messages, **fields), ANSWERS)


def test_the_roles_of_claude_code_are_the_users() -> None:
    """As in vLLM."""
    result = {"role": "msg", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "3 pm"}]}
    messages = chat({"role": "ctx", "content": "It is cold."}, {"role": "msg", "content": "Go on."}, result).messages
    assert [message.role for message in messages] == ["user", "user", "tool"]


def test_a_reference_to_a_tool_is_its_name() -> None:
    found = [{"type": "tool_reference", "tool_name": name} for name in ("now", "then")]
    [message] = chat(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": found}]}
    ).messages
    assert message.content == "now\nthen\n"


@pytest.mark.parametrize(("is_error", "expected"), [(True, "Error: no"), (False, "no"), (None, "no")])
def test_a_model_is_told_that_a_tool_failed(is_error: bool | None, expected: str) -> None:
    block = {"type": "tool_result", "tool_use_id": "a", "content": "no", "is_error": is_error}
    [message] = chat({"role": "user", "content": [block]}).messages
    assert (message.role, message.content) == ("tool", expected)


def test_web_search_is_left_out_and_named() -> None:
    asked = body(tools=[SEARCH, TOOL])
    assert [tool.function.name for tool in to_chat_body(asked, ANSWERS).tools or ()] == ["now"]
    assert ignored_fields(asked, ANSWERS) == ["tools.web_search_20250305"]
    assert chat(tools=[SEARCH]).tools is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "now"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": [SEARCH]}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": ["any"]}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [TOOL, {"name": "not a name"}]}, "tools.1.name"),
        ({"tools": [SEARCH, {"name": "now", "input_schema": 3}]}, "tools.1.input_schema"),
        ({"metadata": {"user_id": "u" * 1025}}, "metadata.user_id"),
    ],
)
def test_mistakes_have_the_names_of_this_api(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat(**fields)
    assert refused.value.param == param and param in refused.value.message


def test_mistakes_in_blocks_are_told_by_their_place() -> None:
    for block, param in (
        ({"type": "tool_use", "input": {}}, "name"),
        ({"type": "tool_use", "name": "n", "input": 3}, "input"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            chat(USER, {"role": "assistant", "content": [block]})
        assert refused.value.param == f"messages.1.content.0.{param}"


def test_a_call_keeps_its_arguments() -> None:
    use = {"type": "tool_use", "id": "a", "name": "now", "input": {"zone": "CET"}}
    [call] = chat(USER, {"role": "assistant", "content": [use]}).messages[1].tool_calls or ()
    assert (call.id, call.function.name, json.loads(call.function.arguments or "")) == ("a", "now", {"zone": "CET"})
