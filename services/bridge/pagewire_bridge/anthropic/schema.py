"""The request bodies of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_UINT32_MAX = 2**32 - 1


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Message(_Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


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
    metadata: dict[str, Any] | None = None
