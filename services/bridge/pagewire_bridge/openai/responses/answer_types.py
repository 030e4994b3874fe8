"""What the Responses API answers, as types for the OpenAPI document. Keys that are not required may be absent."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from pagewire_bridge.openai.answer_types import TokenLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningOutput(TypedDict):
    """summary is empty: the thoughts themselves are in content."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCall(TypedDict):
    """arguments: JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    arguments: str


class CustomToolCall(TypedDict):
    """Of a tool that is given one text."""

    id: str
    type: Literal["custom_tool_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    input: str


OutputItem = OutputMessage | ReasoningOutput | FunctionCall | CustomToolCall


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ReasoningAsked(TypedDict):
    effort: str | None
    summary: None


class ConversationOf(TypedDict):
    id: str


class ResponseAnswer(TypedDict):
    """completed_at: of completed ones alone. service_tier, conversation: if it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    model: str
    background: bool
    store: bool
    instructions: str | None
    previous_response_id: str | None
    conversation: NotRequired[ConversationOf]
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float | None
    top_p: float | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: ReasoningAsked
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    service_tier: NotRequired[str]


class _Event(TypedDict):
    sequence_number: int


class ResponseEvent(_Event):
    """The first two or three events, and the last one."""

    type: Literal[
        "response.created", "response.queued", "response.in_progress", "response.completed", "response.incomplete",
        "response.failed",
    ]  # fmt: skip
    response: ResponseAnswer


class _OutputEvent(_Event):
    output_index: int


class OutputItemEvent(_OutputEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    item: OutputItem


class _InnerEvent(_OutputEvent):
    item_id: str


class ContentPartEvent(_InnerEvent):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ReasoningText


class TextDelta(_InnerEvent):
    """logprobs: of an answer's text, and not of thoughts."""

    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    content_index: int
    delta: str
    logprobs: NotRequired[list[TokenLogprob]]


class TextDone(_InnerEvent):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    content_index: int
    text: str
    logprobs: NotRequired[list[TokenLogprob]]


class ArgumentsDelta(_InnerEvent):
    """The deltas add up to JSON text."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_InnerEvent):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class InputDelta(_InnerEvent):
    type: Literal["response.custom_tool_call_input.delta"]
    delta: str


class InputDone(_InnerEvent):
    type: Literal["response.custom_tool_call_input.done"]
    input: str


class ErrorEvent(_Event):
    """The stream of a background response cannot go on; the response may."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


Event = (
    ResponseEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDelta
    | TextDone
    | ArgumentsDelta
    | ArgumentsDone
    | InputDelta
    | InputDone
    | ErrorEvent
)


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
