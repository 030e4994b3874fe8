"""A client's chat as the text of its prompt: a pure function over a template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pagewire.v1 import inference_pb2
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.errors import InvalidRequest

_RESERVED = frozenset({"messages", "add_generation_prompt", "chat_template", "tokenize"})


def render(chat: inference_pb2.Chat, template: ChatTemplate | None) -> str:
    """The prompt that a template makes of a chat; the template is None where the model has none.

    Raises InvalidRequest.
    """
    if template is None:
        raise InvalidRequest("this model has no chat template: use completions, or start with --chat-template")
    if not chat.messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    messages = [_message(message) for message in chat.messages]
    if any(not m["role"] for m in messages):
        raise InvalidRequest("every message needs a role", param="messages")
    add_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    if not chat.HasField("add_generation_prompt") and chat.continue_final_message:
        add_prompt = False
    return template.render(
        messages,
        add_generation_prompt=add_prompt,
        continue_final_message=chat.continue_final_message,
        kwargs=template_kwargs(chat.template_kwargs_json)
        | ({"tools": _tools(chat.tools_json)} if chat.tools_json else {}),
    )


def fill(chat: inference_pb2.Chat, defaults: Mapping[str, Any]) -> None:
    """Sets the template's variables that a chat says nothing of. Raises InvalidRequest."""
    if defaults:
        chat.template_kwargs_json = json.dumps({**defaults, **template_kwargs(chat.template_kwargs_json)})


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    fields = _read_json(message.fields_json, dict, "messages") if message.fields_json else {}
    name = {"name": message.name} if message.name else {}
    return {**fields, "role": message.role, "content": message.content, **name}


def _tools(text: str) -> list[Any]:
    tools: list[Any] = _read_json(text, list, "tools")
    return tools


def _read_json(text: str, kind: type, param: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"this is not JSON: {error}", param=param) from error
    if not isinstance(value, kind):
        raise InvalidRequest(f"this must be a JSON {kind.__name__}", param=param)
    return value


def template_kwargs(text: str) -> dict[str, Any]:
    """Variables of a template from JSON; none of an empty text. Raises InvalidRequest."""
    try:
        kwargs = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"template_kwargs_json is not JSON: {error}", param="chat_template_kwargs") from error
    if not isinstance(kwargs, dict):
        raise InvalidRequest("template_kwargs_json must be a JSON object", param="chat_template_kwargs")
    reserved = kwargs.keys() & _RESERVED
    if reserved:
        raise InvalidRequest(f"template variables cannot be replaced: {sorted(reserved)}", param="chat_template_kwargs")
    return kwargs
