"""Items of a conversation in the Responses API: read, as they are stored, and as a chat's messages. Pure functions.

reasoning, message of the assistant, function_call, custom_tool_call ...     what one turn of the model gave
message of anybody else, function_call_output, custom_tool_call_output       what it is told
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from pagewire_bridge.body import validated
from pagewire_bridge.openai.responses.tools import name_of

Fields = dict[str, Any]
PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}  # of ids
_TEXTS = ("input_text", "output_text", "text")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


def _described(*kinds: str) -> WithJsonSchema:
    """Text, or parts of it; functions below judge them."""
    text = {"type": {"enum": [*kinds]}, "text": {"type": "string"}}
    refusal = {"type": {"const": "refusal"}, "refusal": {"type": "string"}}
    parts = [{"type": "object", "properties": part, "required": [*part]} for part in (text, refusal)]
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": parts}}]})


_Content = Annotated[Any, _described(*_TEXTS)]


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    status: str | None = None


class MessageItem(_Item):
    """content: a string, or parts of text (input_text, output_text, refusal)."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class FunctionCallOutputItem(_Item):
    """output: a string, or parts of text."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content


class CustomToolCallItem(_Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class CustomToolCallOutputItem(_Item):
    """output: a string, or parts of text."""

    type: Literal["custom_tool_call_output"]
    call_id: str
    output: _Content


class ReasoningItem(_Item):
    """content: parts of type reasoning_text, as answers have them."""

    type: Literal["reasoning"]
    summary: list[Fields] = Field(default_factory=list)
    content: list[Fields] | None = None


class ItemReference(_Item):
    """An item of a stored response, or of its input."""

    type: Literal["item_reference"] = "item_reference"
    id: Annotated[str, Field(min_length=1)]


InputItem = (
    MessageItem
    | FunctionCallItem
    | FunctionCallOutputItem
    | CustomToolCallItem
    | CustomToolCallOutputItem
    | ReasoningItem
    | ItemReference
)
_KINDS: dict[str, type[_Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "custom_tool_call": CustomToolCallItem,
    "custom_tool_call_output": CustomToolCallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


def input_items(value: object) -> list[Fields]:
    """The items of `input` as they are stored: content is a list of parts. Raises InvalidRequest."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("`input` must be a string or a list of items, and not empty.", "input")
    return items_of(value, "input")


def items_of(values: Iterable[object], name: str) -> list[Fields]:
    """The same of a list. name: of its field."""
    return [_item(item, f"{name}[{i}]") for i, item in enumerate(values)]


def _item(item: object, where: str) -> Fields:
    if not isinstance(item, dict):
        raise InvalidRequest(f"`{where}` must be an object.", where)
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidRequest(f"`{where}.type` is not supported; it may be {', '.join(_KINDS)}.", f"{where}.type")
    fields = validated(_KINDS[kind], item, where).model_dump(exclude_none=True)
    if kind == "message":
        part = "output_text" if fields["role"] == "assistant" else "input_text"
        fields["content"] = _parts(fields.get("content"), part, f"{where}.content")
    elif kind in _OUTPUTS:
        parts = _parts(fields.get("output"), "input_text", f"{where}.output")
        fields["output"] = "".join(part["text"] for part in parts)
    elif "content" in fields:  # of thoughts
        fields["content"] = _parts(fields["content"], "reasoning_text", f"{where}.content")
    return fields


def _parts(content: object, kind: str, where: str) -> list[Fields]:
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"`{where}` must be a string or a list of text parts.", where)
    return [_part(part, kind, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: object, kind: str, where: str) -> Fields:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"`{where}` must be an object with a `type`.", where)
    text = part.get("refusal" if part["type"] == "refusal" else "text")
    if part["type"] not in (*_TEXTS, "refusal", kind):
        raise InvalidRequest(f"`{where}` has a type that is not supported; only text is.", f"{where}.type")
    if not isinstance(text, str):
        raise InvalidRequest(f"`{where}.text` must be a string.", f"{where}.text")
    return {"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})}


def with_ids(items: Iterable[Fields], suffix: str) -> list[Fields]:
    """The same, each with an id; those that had none get one that ends in `suffix` and their place."""
    return [
        {**item, "id": item.get("id") or f"{PREFIXES[item['type']]}_{suffix}_in{i}"} for i, item in enumerate(items)
    ]


_THOUGHTS, _TEXT, _CALLS, _OTHER = range(4)  # a turn of the model goes upwards, with any number of calls


def to_messages(items: Iterable[Fields]) -> list[Fields]:
    """As messages of a chat: the thoughts, the text and the calls of one turn of the model are one message again."""
    messages: list[Fields] = []
    before = _OTHER
    for item in items:
        place = _place(item)
        if place == _OTHER:
            messages.append(_told(item))
        else:
            if place <= before and not place == before == _CALLS:
                messages.append({"role": "assistant", "content": ""})
            _add(messages[-1], item)
        before = place
    return messages


def _place(item: Fields) -> int:
    if item["type"] == "message":
        return _TEXT if item["role"] == "assistant" else _OTHER
    return {"reasoning": _THOUGHTS, "function_call": _CALLS, "custom_tool_call": _CALLS}.get(item["type"], _OTHER)


def _told(item: Fields) -> Fields:
    if item["type"] in _OUTPUTS:
        return {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
    return {"role": item["role"], "content": _joined(item["content"])}


def _add(turn: Fields, item: Fields) -> None:
    match item["type"]:
        case "reasoning":
            turn["reasoning"] = _joined(item.get("content", ())) or None
        case "message":
            turn["content"] = _joined(item["content"])
        case "function_call":
            _add_call(turn, item, "function", {"arguments": item["arguments"]})
        case "custom_tool_call":
            _add_call(turn, item, "custom", {"input": item["input"]})


def _add_call(turn: Fields, item: Fields, kind: str, given: Fields) -> None:
    named = {"name": name_of(item["name"], item.get("namespace")), **given}
    turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": kind, kind: named})


def _joined(parts: Iterable[Fields]) -> str:
    return "".join(part["text"] for part in parts)
