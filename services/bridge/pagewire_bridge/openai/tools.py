"""`tools`, `tool_choice` and the calls in messages, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field

from pagewire_bridge.by_type import BY_TYPE, by_type, kind
from pagewire_bridge.json_text import TooDeep, exact
from pagewire_bridge.tools import custom
from pagewire_bridge.tools.calls import Tool

MAX_TOOLS = 1024  # agents with many servers of tools behind them have more than OpenAI's 128


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

    @property
    def name(self) -> str:
        return self.function.name

    def to_tool(self) -> Tool:
        function = self.function
        tool = Tool(function.name, function.description or "", strict=bool(function.strict))
        return tool if not function.parameters else Tool(tool.name, tool.description, function.parameters, tool.strict)

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class Grammar(_Shape):
    """definition: in the Lark that llguidance reads, or a regex of Rust's."""

    syntax: Literal["lark", "regex"]
    definition: str

    def to_form(self) -> dict[str, Any]:
        """As structural tags have it."""
        if self.syntax == "regex":
            return {"type": "regex", "pattern": self.definition}
        return {"type": "grammar", "grammar": self.definition}


class AnyText(_Shape):
    type: Literal["text"]


class GrammarText(_Shape):
    type: Literal["grammar"]
    grammar: Grammar


class CustomShape(_Shape):
    name: ToolName
    description: str | None = None
    format: Annotated[Annotated[AnyText, kind("text")] | Annotated[GrammarText, kind("grammar")], BY_TYPE] | None = None


class CustomToolShape(_Shape):
    """A tool that is given one text."""

    type: Literal["custom"]
    custom: CustomShape

    @property
    def name(self) -> str:
        return self.custom.name

    @property
    def _grammar(self) -> Grammar | None:
        return self.custom.format.grammar if isinstance(self.custom.format, GrammarText) else None

    def to_tool(self) -> Tool:
        form = self._grammar.to_form() if self._grammar else None
        return Tool(self.name, self.custom.description or "", self._parameters(), custom=True, form=form)

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.custom.description or "", "parameters": self._parameters()}
        return {"type": "function", "function": function}

    def _parameters(self) -> dict[str, Any]:
        if self._grammar is None:
            return custom.parameters("Any text.")
        told = {"lark": "follows this Lark grammar", "regex": "matches this regular expression"}[self._grammar.syntax]
        return custom.parameters(f"A text that {told}:\n{self._grammar.definition}")


class FunctionName(_Shape):
    name: str


class NamedTool(_Shape):
    type: Literal["function"]
    function: FunctionName

    @property
    def name(self) -> str:
        return self.function.name


class NamedCustomTool(_Shape):
    type: Literal["custom"]
    custom: FunctionName

    @property
    def name(self) -> str:
        return self.custom.name


NAMED = NamedTool | NamedCustomTool
_Named = Annotated[Annotated[NamedTool, kind("function")] | Annotated[NamedCustomTool, kind("custom")], BY_TYPE]


class AllowedTools(_Shape):
    mode: Literal["auto", "required"]
    tools: list[_Named]


class AllowedToolsChoice(_Shape):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


AnyToolShape = ToolShape | CustomToolShape
_Tool = Annotated[Annotated[ToolShape, kind("function")] | Annotated[CustomToolShape, kind("custom")], BY_TYPE]
Tools = Annotated[list[_Tool], Field(min_length=1, max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | NamedCustomTool | AllowedToolsChoice
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


class GivenText(_Shape):
    name: str
    input: str


class CalledCustomTool(_Shape):
    id: str | None = None
    type: Literal["custom"]
    custom: GivenText

    def to_fields(self, where: str) -> dict[str, Any]:
        """As the call of a function that the model knows it as."""
        function = {"name": self.custom.name, "arguments": exact(custom.arguments(self.custom.input))}
        return {"id": self.id, "type": "function", "function": function}


AnyCalledTool = Annotated[
    Annotated[CalledTool, kind("function")] | Annotated[CalledCustomTool, kind("custom")], by_type(absent="function")
]


def chosen(
    tools: Sequence[AnyToolShape], choice: ToolChoice | None
) -> tuple[Literal["none", "auto", "required"], list[Tool]]:
    """How tools are to be called, and those that may be. Raises InvalidRequest for a choice of what is not there."""
    known = {tool.name: tool.to_tool() for tool in tools}
    if len(known) < len(tools):
        raise InvalidRequest("Every tool needs a name of its own.", "tools")
    if choice is None or isinstance(choice, str):
        return (choice or "auto") if known else "none", list(known.values())
    named = [choice] if isinstance(choice, NAMED) else choice.allowed_tools.tools
    missing = [tool.name for tool in named if tool.name not in known]
    if missing or not named:
        raise InvalidRequest(f"`tool_choice` names a tool that is not in `tools`: {missing}.", "tool_choice")
    mode = "required" if isinstance(choice, NAMED) else choice.allowed_tools.mode
    return mode, [known[tool.name] for tool in named]
