"""The Responses API as OpenAI's chat, which is then asked for, and what of a response is known before its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pagewire_bridge.body import to_object, validated
from pagewire_bridge.openai.responses.items import Fields, to_messages
from pagewire_bridge.openai.responses.schema import ResponsesBody, TextFormat
from pagewire_bridge.openai.responses.tools import WebSearchTool, to_chat_choice, to_chat_tools
from pagewire_bridge.openai.schema import ChatBody, ConversationBody, SamplingBody
from pagewire_bridge.openai.unsupported import refuse_unsupported_in_responses, unknown_fields

# What is one field here and another one of the chat.
CHAT_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens",
           "max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort"}  # fmt: skip
_ECHOED = ("instructions", "previous_response_id", "max_output_tokens", "max_tool_calls", "temperature", "top_p",
           "user", "safety_identifier", "prompt_cache_key")  # fmt: skip


def parse_body(data: bytes) -> ResponsesBody:
    """Raises InvalidRequest: not a JSON object, a bad field, or one that asks for what this version does not do."""
    fields = to_object(data)
    refuse_unsupported_in_responses(fields)
    return validated(ResponsesBody, fields)


def ignored_fields(body: ResponsesBody) -> list[str]:
    """Names of the fields that have no effect."""
    names = unknown_fields(body)
    names += {f"tools.{tool.type}" for tool in body.tools or () if isinstance(tool, WebSearchTool)}
    if "reasoning.encrypted_content" in (body.include or ()):
        names.append("include.reasoning.encrypted_content")
    return names


def to_chat_body(body: ResponsesBody, items: Iterable[Fields]) -> ChatBody:
    """items: the whole conversation, in order. Raises InvalidRequest."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return validated(
        ChatBody,
        {
            **{name: getattr(body, name) for name in (*SamplingBody.model_fields, *ConversationBody.model_fields)},
            "messages": [*system, *to_messages(items)],
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": body.with_logprobs,
            "top_logprobs": (body.top_logprobs or 0) if body.with_logprobs else None,
            "response_format": _response_format(body.text.format if body.text else None),
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "parallel_tool_calls": body.parallel_tool_calls,
            **_tools(body),
        },
    )


def _response_format(form: TextFormat | None) -> Fields | None:
    if form is None or form.type != "json_schema":
        return {"type": form.type} if form else None
    schema = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": schema}


def _tools(body: ResponsesBody) -> Fields:
    """`tools: []` asks for nothing here: clients send it."""
    return {"tools": [*to_chat_tools(body.tools or ())] or None, "tool_choice": to_chat_choice(body.tool_choice)}


def to_head(body: ResponsesBody, response_id: str, model: str, created_at: int) -> Fields:
    """Everything of a response object that its answer does not change."""
    tier = {"service_tier": "default" if body.service_tier == "auto" else body.service_tier}
    form = body.text.format if body.text and body.text.format else TextFormat(type="text")
    tools = [tool.model_dump() for tool in body.tools or ()]
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "model": model,
        "background": bool(body.background),
        "store": body.is_stored,
        **{name: getattr(body, name) for name in _ECHOED},
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
        **({"conversation": {"id": body.conversation_id}} if body.conversation_id is not None else {}),
        "tools": tools,
        "tool_choice": _echoed_choice(body),
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        **(tier if body.service_tier else {}),
    }


def _echoed_choice(body: ResponsesBody) -> str | Mapping[str, Any]:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump(exclude_none=True)
