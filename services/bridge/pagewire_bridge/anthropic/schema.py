"""The request bodies of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pagewire_bridge.openai.tools import ToolName

_UINT32_MAX = 2**32 - 1


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Message(_Body):
    """ctx and msg are what Claude Code calls a user's message that it has written itself."""

    role: Literal["user", "assistant", "system", "ctx", "msg"]
    content: str | list[dict[str, Any]]


class Tool(_Body):
    """That the client runs."""

    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolUse(_Body):
    """The block of a call."""

    id: str | None = None
    name: str
    input: dict[str, Any] | None = None


class ToolResult(_Body):
    """The block of what a call gave."""

    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None


class Metadata(_Body):
    user_id: Annotated[str, Field(max_length=1024)] | None = None


class Thinking(_Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Body):
    type: Literal["json_schema"]
    form: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class _Prompt(_Body):
    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # of the API's beta; now in output_config

    @property
    def thinking_asked(self) -> Thinking | None:
        return None if self.thinking is None or self.thinking.type == "disabled" else self.thinking


class CountBody(_Prompt):
    """POST /v1/messages/count_tokens."""


class MessagesBody(_Prompt):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=_UINT32_MAX)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None = None
    metadata: Metadata | None = None
