"""Qwen3-Coder's calls: parameters as XML elements, whose values are text unless their schema says otherwise."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pagewire_bridge.json_text import read, written
from pagewire_bridge.tools.calls import Tool
from pagewire_bridge.tools.json_walk import Walk
from pagewire_bridge.tools.marked import OneMark

T = TypeVar("T")
_FUNCTION, _PARAMETER = "<function=", "<parameter="
_PARAMETER_END, _FUNCTION_END, _CALL_END = "</parameter>", "</function>", "</tool_call>"
_AFTER_VALUE = (_PARAMETER, _FUNCTION_END, _CALL_END)
# Models forget the end of a value: what follows it ends it, too, at the beginning of a line.
_VALUE_ENDS = (_PARAMETER_END, *(f"\n{mark}" for mark in _AFTER_VALUE))


def _is_text(schema: object) -> bool:
    """Whether a value of this schema is written as it is; one of a schema that says nothing is."""
    if not isinstance(schema, dict) or schema.get("type") == "string":
        return True
    return not schema.keys() & {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


class XmlParser(OneMark):
    mark = "<tool_call>"

    def _calls(self) -> Walk:
        yield from self._until(_FUNCTION)
        name = yield from self._text_before(">")
        tool = self._tools.get(name.strip())
        self._call(name.strip())
        between, mark = "{", (yield from self._first_of(_AFTER_VALUE))
        while mark == _PARAMETER:
            key = yield from self._text_before(">")
            text, end = yield from self._text_to(_VALUE_ENDS)
            mark = end.lstrip() if end != _PARAMETER_END else (yield from self._first_of(_AFTER_VALUE))
            properties = _member(tool.parameters, "properties", dict) if tool else {}
            self._argue(f"{between}{json.dumps(key, ensure_ascii=False)}: {_as_json(text, properties.get(key))}")
            between = ", "
        self._argue("{}" if between == "{" else "}")
        return (yield from self._to_end(_CALL_END)) if mark == _FUNCTION_END else None


def _member(schema: dict[str, Any], name: str, kind: type[T]) -> T:
    """Clients write what they like in a schema: null, for one, where there is nothing."""
    value = schema.get(name)
    return value if isinstance(value, kind) else kind()


def _as_json(text: str, schema: object) -> str:
    text = text.removeprefix("\n").removesuffix("\n")
    if not _is_text(schema):
        try:
            return written(read(text.encode())).decode()
        except ValueError:
            pass  # the model's mistake: the application sees the text
    return json.dumps(text, ensure_ascii=False)


def xml_call(tool: Tool) -> dict[str, Any]:
    """The form of one call: the properties in their order, those that are not required perhaps left out."""
    required = _member(tool.parameters, "required", list)
    elements = []
    for key, schema in _member(tool.parameters, "properties", dict).items():
        defs = {"$defs": tool.parameters["$defs"]} if "$defs" in tool.parameters else {}
        inside: dict[str, Any] = {"type": "any_text"}
        if isinstance(schema, dict) and "enum" in schema:
            texts = [_text(value) for value in _member(schema, "enum", list) if isinstance(value, str)]
            inside = {"type": "or", "elements": texts}
        if not _is_text(schema):
            inside = {"type": "json_schema", "json_schema": {**schema, **defs}}
        element = {
            "type": "tag", "begin": f"{_PARAMETER}{key}>\n", "content": inside, "end": "\n</parameter>\n",
        }  # fmt: skip
        elements.append(element if key in required else {"type": "or", "elements": [element, _text("")]})
    elements.append(_text("</function>\n</tool_call>"))
    begin = f"<tool_call>\n{_FUNCTION}{tool.name}>\n"
    return {"type": "tag", "begin": begin, "content": {"type": "sequence", "elements": elements}, "end": ""}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}
