"""`tools`, `tool_choice` and the calls in messages, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field

from pagewire_bridge.json_text import TooDeep, exact
from pagewire_bridge.tools.calls import Tool

MAX_TOOLS = 128


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class FunctionShape(_Shape):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolShape(_Shape):
    type: Literal["function"]
    function: FunctionShape

    def to_tool(self) -> Tool:
        function = self.function
        tool = Tool(function.name, function.description or "", strict=bool(function.strict))
        return tool if not function.parameters else Tool(tool.name, tool.description, function.parameters, tool.strict)


class FunctionName(_Shape):
    name: str


class NamedTool(_Shape):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Shape):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(_Shape):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Tools = Annotated[list[ToolShape], Field(min_length=1, max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice
# The same before there were tools.
Functions = Annotated[list[FunctionShape], Field(max_length=MAX_TOOLS)]
FunctionChoice = Literal["none", "auto"] | FunctionName


class CalledFunction(_Shape):
    name: str
    arguments: str | None = None


class CalledTool(_Shape):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction

    def to_fields(self, where: str) -> dict[str, Any]:
        """As templates read it: arguments as the object that they are. where: its place. Raises InvalidRequest."""
        arguments: Any = self.function.arguments or "{}"
        try:
            arguments = exact(arguments)
        except TooDeep as error:
            raise InvalidRequest(f"The arguments of a call are {error}.", f"{where}.function.arguments") from None
        except ValueError:
            pass  # a template may still print it
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def chosen(
    tools: Sequence[ToolShape], choice: ToolChoice | None
) -> tuple[Literal["none", "auto", "required"], list[Tool]]:
    """How tools are to be called, and those that may be. Raises InvalidRequest for a choice of what is not there."""
    known = {tool.function.name: tool.to_tool() for tool in tools}
    if len(known) < len(tools):
        raise InvalidRequest("Every tool needs a name of its own.", "tools")
    if choice is None or isinstance(choice, str):
        return (choice or "auto") if known else "none", list(known.values())
    named = [choice] if isinstance(choice, NamedTool) else choice.allowed_tools.tools
    missing = [tool.function.name for tool in named if tool.function.name not in known]
    if missing or not named:
        raise InvalidRequest(f"`tool_choice` names a tool that is not in `tools`: {missing}.", "tool_choice")
    mode = "required" if isinstance(choice, NamedTool) else choice.allowed_tools.mode
    return mode, [known[tool.function.name] for tool in named]
