"""Anthropic's messages as OpenAI's chat, which is then asked for: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pagewire_core.errors import InvalidRequest

from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.anthropic.schema import CountBody, MessagesBody, Tool, ToolResult, ToolUse
from pagewire_bridge.body import validated
from pagewire_bridge.json_text import written
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.unsupported import unknown_fields

Fields = dict[str, Any]
_ROLES = {"ctx": "user", "msg": "user"}
_WEB_SEARCH = "web_search_"  # of any version: agents offer it to any model, which may answer without it
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS = {"xhigh": "high", "max": "high"}  # which templates do not know


def to_chat_body(body: MessagesBody | CountBody, answers: AnswerFormat) -> ChatBody:
    """The system prompt is the first message; a final assistant message is continued. Raises InvalidRequest."""
    messages: list[Fields] = [{"role": "system", "content": _to_text(body.system, "system")}] if body.system else []
    for i, message in enumerate(body.messages):
        role = _ROLES.get(message.role, message.role)
        messages += _to_messages(role, message.content, f"messages.{i}.content")
    fields: Fields = {"model": body.model, "messages": messages, **_tools(body), **_form(body)}
    if body.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    if isinstance(body, MessagesBody):
        fields |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "user": body.metadata and body.metadata.user_id,
        }
    return validated(ChatBody, fields | _thinking(body, answers))


def ignored_fields(body: MessagesBody | CountBody, answers: AnswerFormat) -> list[str]:
    """Fields without an effect: coding agents ask any model to think, and one that cannot answers as it can."""
    output, thinks = body.output_config, answers.reasoning is not None and body.thinking_asked is not None
    names = unknown_fields(body)
    if body.thinking_asked and not thinks:
        names.append("thinking")
    if output and output.effort and not thinks:
        names.append("output_config.effort")
    names += {f"tools.{tool['type']}" for tool in body.tools or () if _is_web_search(tool)}
    return names


def _thinking(body: MessagesBody | CountBody, answers: AnswerFormat) -> Fields:
    """Off unless it is asked for, as in Anthropic's API."""
    asked = body.thinking_asked
    if asked is None or answers.reasoning is None:
        return {"chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False}
    fields: Fields = {
        "chat_template_kwargs": {"enable_thinking": True},
        "thinking_token_budget": asked.budget_tokens,
        "include_reasoning": asked.display != "omitted",
    }
    if effort := body.output_config and body.output_config.effort:
        fields["reasoning_effort"] = _EFFORTS.get(effort, effort)
    return fields


def _form(body: MessagesBody | CountBody) -> Fields:
    form = (body.output_config and body.output_config.format) or body.output_format
    if form is None:
        return {}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.form}}}


def _tools(body: MessagesBody | CountBody) -> Fields:
    choice = body.tool_choice or {"type": "auto"}
    kind, name = choice.get("type"), choice.get("name")
    if kind == "tool" and isinstance(name, str):
        wanted: Any = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in _CHOICES:
        wanted = _CHOICES[kind]
    else:
        raise InvalidRequest("tool_choice: type must be auto, any, none, or tool with a name", "tool_choice")
    tools = [_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools or ()) if not _is_web_search(tool)]
    if not tools:
        if kind in ("any", "tool"):
            raise InvalidRequest("tool_choice: there is no tool that could be called", "tool_choice")
        return {}
    parallel = not choice.get("disable_parallel_tool_use")
    return {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": parallel}


def _is_web_search(tool: Fields) -> bool:
    return str(tool.get("type")).startswith(_WEB_SEARCH)


def _tool(tool: Fields, where: str) -> Fields:
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequest(f"{where}.type: only custom tools and web search are supported", f"{where}.type")
    given = validated(Tool, tool, where)
    function = {"name": given.name, "description": given.description, "parameters": given.input_schema}
    return {"type": "function", "function": {**function, "strict": given.strict}}


def _to_messages(role: str, content: str | Sequence[Fields], where: str) -> Iterator[Fields]:
    """Results of tools are messages of their own, and come before the rest."""
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    text, calls, thoughts = "", [], ""
    for i, block in enumerate(content):
        match block.get("type"):
            case "tool_result" if role == "user":
                result = validated(ToolResult, block, f"{where}.{i}")
                told = _to_text(result.content or "", f"{where}.{i}.content")
                told = f"Error: {told}" if result.is_error else told  # messages of a chat have no other place for it
                yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": told}
            case "tool_use" if role == "assistant":
                use = validated(ToolUse, block, f"{where}.{i}")
                function = {"name": use.name, "arguments": written(use.input or {}).decode()}
                calls.append({"id": use.id, "type": "function", "function": function})
            case "thinking" if role == "assistant":
                thoughts += str(block.get("thinking", ""))
            case "redacted_thinking":
                pass
            case _:
                text += _block_text(block, f"{where}.{i}")
    if text or calls or role == "assistant":
        yield {"role": role, "content": text, "tool_calls": calls or None, "reasoning": thoughts or None}


def _to_text(content: str | Sequence[Fields], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_block_text(block, f"{where}.{i}") for i, block in enumerate(content))


def _block_text(block: object, where: str) -> str:
    fields = block if isinstance(block, dict) else {}
    match fields:
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            return _titled(text, fields.get("title"), fields.get("context"))
        case {"type": "document", "source": {"type": "content", "content": str(text)}}:
            return _titled(text, fields.get("title"), fields.get("context"))
        case {"type": "document", "source": {"type": "content", "content": list(parts)}}:
            text = _joined_text(parts, f"{where}.source.content")
            return _titled(text, fields.get("title"), fields.get("context"))
        case {"type": "search_result", "content": list(parts)}:
            return _titled(_joined_text(parts, f"{where}.content"), fields.get("title"), fields.get("source"))
        case {"type": "tool_reference", "tool_name": str(name)}:
            return f"{name}\n"
        case {"type": "document", "source": {"type": kind}}:
            raise InvalidRequest(
                f"{where}.source: documents of type {kind!r} are not supported here", f"{where}.source"
            )
    return _plain_text(block, where)


def _joined_text(parts: Sequence[object], where: str) -> str:
    """Of what is inside a document: no document is in another."""
    return "".join(_plain_text(part, f"{where}.{i}") for i, part in enumerate(parts))


def _plain_text(block: object, where: str) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "text"}:
            raise InvalidRequest(f"{where}.text: must be a string", f"{where}.text")
        case {**fields}:
            raise InvalidRequest(f"{where}: blocks of type {fields.get('type')!r} are not supported here", where)
    raise InvalidRequest(f"{where}: must be a content block", where)


def _titled(text: str, *above: object) -> str:
    """A document as part of a text, apart from what follows."""
    return "\n".join([*(line for line in above if isinstance(line, str)), text, "\n"])
