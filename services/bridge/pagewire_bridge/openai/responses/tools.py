"""Tools as the Responses API has them: functions, custom tools, which are given one text, both also in a namespace, and
web search, which nobody here does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pagewire_bridge.body import validated
from pagewire_bridge.by_type import BY_TYPE, kind
from pagewire_bridge.openai.tools import MAX_TOOLS, AnyText, Grammar, ToolName


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class FunctionTool(_Shape):
    """strict is true unless it is said otherwise, as OpenAI has it here (and not in chats)."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = True


class GrammarText(Grammar):
    type: Literal["grammar"]


class CustomTool(_Shape):
    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: Annotated[Annotated[AnyText, kind("text")] | Annotated[GrammarText, kind("grammar")], BY_TYPE] | None = None


InnerTool = FunctionTool | CustomTool
_Inner = Annotated[Annotated[FunctionTool, kind("function")] | Annotated[CustomTool, kind("custom")], BY_TYPE]


class NamespaceTool(_Shape):
    """A call of one of its tools has a `namespace` beside its name."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[_Inner], Field(min_length=1, max_length=MAX_TOOLS)]


class WebSearchTool(_Shape):
    """Agents offer it to any model, which may answer without it: it is left out, and named as ignored."""

    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]


Tool = FunctionTool | CustomTool | NamespaceTool | WebSearchTool
_KINDS: dict[str, type[Tool]] = {
    name: tool
    for tool in (FunctionTool, CustomTool, NamespaceTool, WebSearchTool)
    for name in get_args(tool.model_fields["type"].annotation)
}


def read_tools(value: object) -> list[Tool]:
    """`tools` of a request. Raises InvalidRequest."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidRequest(f"`tools` must be a list of at most {MAX_TOOLS} tools.", "tools")
    return [_read(tool, f"tools[{i}]") for i, tool in enumerate(value)]


def _read(tool: object, where: str) -> Tool:
    name = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(name, str) or name not in _KINDS:
        raise InvalidRequest(f"`{where}.type` is not supported; it may be {', '.join(_KINDS)}.", f"{where}.type")
    return validated(_KINDS[name], tool, where)


_Described = Annotated[list[Annotated[Tool, Field(discriminator="type")]], Field(max_length=MAX_TOOLS)]
Tools = Annotated[list[Tool], PlainValidator(read_tools, json_schema_input_type=_Described)]


class FunctionChoice(_Shape):
    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class AllowedChoice(_Shape):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice


def name_of(name: str, namespace: str | None) -> str:
    """Of a function, as the model knows it."""
    return f"{namespace}__{name}" if namespace else name


def to_chat_tools(tools: Iterable[Tool]) -> Iterator[dict[str, Any]]:
    """As a chat has them."""
    for tool in tools:
        if isinstance(tool, InnerTool):
            yield _chat_tool(tool, {})
        elif isinstance(tool, NamespaceTool):
            for inner in tool.tools:
                told = " ".join(filter(None, (tool.description, inner.description)))
                renamed = {"name": name_of(inner.name, tool.name), "description": told or None}
                yield _chat_tool(inner, renamed)


def _chat_tool(tool: InnerTool, renamed: dict[str, Any]) -> dict[str, Any]:
    """renamed: what is not as the tool itself has it."""
    fields = {**tool.model_dump(exclude={"type"}), **renamed}
    if isinstance(tool, CustomTool) and isinstance(tool.format, GrammarText):
        fields["format"] = {"type": "grammar", "grammar": tool.format.model_dump(exclude={"type"})}
    return {"type": tool.type, tool.type: fields}


def to_chat_choice(choice: ToolChoice | None) -> Any:
    """As a chat has it."""
    if isinstance(choice, FunctionChoice):
        return _named(choice)
    if isinstance(choice, AllowedChoice):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": choice.type, choice.type: {"name": name_of(choice.name, choice.namespace)}}


def called(tools: Iterable[Tool]) -> Mapping[str, dict[str, str]]:
    """By a name that the model knows, what a call of that function says of it, if that is more than this name."""
    return {
        name_of(inner.name, tool.name): {"name": inner.name, "namespace": tool.name}
        for tool in tools
        if isinstance(tool, NamespaceTool)
        for inner in tool.tools
    }
