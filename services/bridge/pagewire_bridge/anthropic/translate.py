"""Anthropic's messages as a GenerateRequest: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.anthropic.schema import CountBody, MessagesBody
from pagewire_bridge.model_names import to_served_name


def to_chat(body: MessagesBody | CountBody) -> inference_pb2.Chat:
    """The system prompt is the first message; a final assistant message is continued. Raises InvalidRequest."""
    _refuse_unsupported(body)
    chat = inference_pb2.Chat(continue_final_message=body.messages[-1].role == "assistant")
    if body.system:
        chat.messages.add(role="system", content=_to_text(body.system, "system"))
    for i, message in enumerate(body.messages):
        chat.messages.add(role=message.role, content=_to_text(message.content, f"messages.{i}.content"))
    return chat


def to_request(body: MessagesBody, request_id: str) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest."""
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=to_served_name(body.model),
        chat=to_chat(body),
        sampling=common_pb2.SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k or 0,
            max_tokens=body.max_tokens,
            stop=body.stop_sequences or (),
        ),
    )


def _refuse_unsupported(body: MessagesBody | CountBody) -> None:
    if body.tools:
        raise InvalidRequest("tools: not supported yet", "tools")
    if (body.thinking or {}).get("type") == "enabled":
        raise InvalidRequest("thinking: this model has no extended thinking", "thinking")


def _to_text(content: str | Sequence[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_block_text(block, f"{where}.{i}") for i, block in enumerate(content))


def _block_text(block: dict[str, Any], where: str) -> str:
    kind, text = block.get("type"), block.get("text")
    if kind != "text":
        raise InvalidRequest(f"{where}: blocks of type {kind!r} are not supported yet", where)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text: must be a string", f"{where}.text")
    return text
