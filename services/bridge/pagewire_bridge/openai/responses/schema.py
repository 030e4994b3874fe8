"""The request body of OpenAI's Responses API, with vLLM's extra parameters, as a pydantic model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from pagewire_bridge.openai.responses.items import InputItem, input_items
from pagewire_bridge.openai.responses.tools import ToolChoice, Tools
from pagewire_bridge.openai.schema import ConversationBody, NumLogprobs, SamplingBody, TokenCount

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
_Items = Annotated[list[InputItem], Field(min_length=1)]  # as they are described
# What answers of other kinds could include is no part of ours, so that asking for it asks for nothing.
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url",
    "web_search_call.action.sources", "web_search_call.results",
]  # fmt: skip


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextFormat(_Shape):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise InvalidRequest("`text.format.schema` is required.", "text.format.schema")
        return self


class TextConfig(_Shape):
    format: TextFormat | None = None


class Reasoning(_Shape):
    effort: Annotated[str, Field(max_length=32)] | None = None


class ConversationId(_Shape):
    id: str


class ResponsesBody(SamplingBody, ConversationBody):
    """POST /v1/responses. input: a string, or items of the conversation."""

    input: Annotated[list[dict[str, Any]], PlainValidator(input_items, json_schema_input_type=str | _Items)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: TokenCount | None = None
    max_tool_calls: int | None = None
    metadata: Metadata | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: NumLogprobs | None = None
    include: list[Includable] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def with_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @model_validator(mode="after")
    def _consistent_response(self) -> Self:
        if self.background and not self.is_stored:
            raise InvalidRequest("`background` needs `store`: who asks later must find it.", "background")
        if self.conversation is not None and self.previous_response_id is not None:
            raise InvalidRequest("`conversation` and `previous_response_id` exclude each other.", "conversation")
        if self.conversation is not None and self.background:
            raise InvalidRequest(
                "`conversation` is not supported yet for a response in the background.", "conversation"
            )
        return self
