"""What a chat may do with its tools, and how its answer is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagewire.v1.inference_pb2 import StructuredOutput
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.answer_parser import AnswerFormat, AnswerParser
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.tools import NAMED, chosen
from pagewire_bridge.tools.calls import Tool, ToolFormat
from pagewire_bridge.tools.custom import custom_calls
from pagewire_bridge.tools.form import output_with_tools


@dataclass(frozen=True)
class ToolUse:
    """form: how calls are written; None: there are none. named: the one that the client names must be called."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[Tool] = field(default_factory=list)
    form: ToolFormat | None = None
    parallel: bool = True
    named: bool = False

    def output(self, wanted: StructuredOutput | None) -> StructuredOutput | None:
        """The form of the answer, given the one that its text is to have."""
        return output_with_tools(wanted, self.form, self.tools, self.mode, self.parallel) if self.form else wanted


def tool_use(body: ChatBody, answers: AnswerFormat) -> ToolUse:
    """Raises InvalidRequest."""
    mode, tools = chosen(body.tools or (), body.tool_choice)
    if mode == "none":
        return ToolUse()
    named = isinstance(body.tool_choice, NAMED)
    parallel = body.parallel_tool_calls is not False and not named
    if mode == "required":
        return ToolUse(mode, tools, answers.forced_tools, parallel, named)
    if answers.tools is None or not answers.auto_tools:
        raise InvalidRequest(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            "function_call" if body.functions else "tool_choice",
        )
    return ToolUse(mode, tools, answers.tools, parallel)


def parser_of(body: ChatBody, answers: AnswerFormat, prompt_tail: str) -> AnswerParser | None:
    """Of one choice; None: its text is its content."""
    use = tool_use(body, answers)
    reasoning = None if body.continue_final_message else answers.reasoning
    if use.form is None and reasoning is None:
        return None
    calls = custom_calls(use.form.parser(use.tools), use.tools, use.form) if use.form else None
    return AnswerParser(calls, reasoning, prompt_tail, use.parallel)
