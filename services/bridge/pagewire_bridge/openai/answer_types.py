"""What the OpenAI endpoints answer, as types for the OpenAPI document. Keys that are not required may be absent."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from pagewire_bridge.openapi.errors import OpenAIError
from pagewire_bridge.openapi.operation import DONE

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class CachedTokens(TypedDict):
    cached_tokens: int


class ReasoningTokens(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    """prompt_tokens_details: known when the answer is whole."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]
    completion_tokens_details: NotRequired[ReasoningTokens]


class Account(TypedDict):
    """Who served a stream, and what moved between the workers; with the usage, if that was asked for."""

    prefill_worker: str
    decode_worker: str
    cached_tokens: int
    computed_tokens: int
    transferred_tokens: int
    transferred_bytes: int
    lane: str


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class Function(TypedDict):
    """arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: Function


class GivenText(TypedDict):
    name: str
    input: str


class CustomToolCall(TypedDict):
    """Of a tool that is given one text."""

    id: str
    type: Literal["custom"]
    custom: GivenText


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall | CustomToolCall]]
    function_call: NotRequired[Function]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: NotRequired[str]


class PromptLogprob(TypedDict):
    """rank: how many tokens are at least as likely, itself included."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; null for the first token


class ChatAnswer(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionPiece(TypedDict):
    """The pieces of `arguments` add up to JSON text."""

    name: NotRequired[str]
    arguments: str


class ToolCallPiece(TypedDict):
    """id, type and name come once."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPiece


class TextPiece(TypedDict):
    """The pieces of `input` add up to the text."""

    name: NotRequired[str]
    input: str


class CustomToolCallPiece(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["custom"]]
    custom: TextPiece


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallPiece | CustomToolCallPiece]]
    function_call: NotRequired[FunctionPiece]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class _Chunk(_Head):
    """usage: only if it was asked for: in the last chunk, which has no choice; before it null, or the count so far."""

    usage: NotRequired[Usage | None]
    pagewire: NotRequired[Account]


class ChatChunk(_Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionLogprobs(TypedDict):
    """With `echo`, the prompt's tokens come first; null for its first one."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class CompletionAnswer(_Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class CompletionChunk(_Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class TokensChoice(TypedDict):
    """finish_reason: null in a chunk that is not the choice's last. Tokens are named `token_id:N` in logprobs."""

    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TokensAnswer(TypedDict):
    """kv_transfer_params: always null: the router arranges transfers."""

    request_id: str
    choices: list[TokensChoice]
    prompt_logprobs: PromptLogprobs | None
    kv_transfer_params: None
    usage: Usage


class TokensChunk(TypedDict):
    """usage: null unless it was asked for; in the last chunk, which has no choice, or the count so far in each."""

    request_id: str
    choices: list[TokensChoice]
    usage: Usage | None
    pagewire: NotRequired[Account]


TokensEvent = TokensChunk | OpenAIError | DONE
ChatEvent = ChatChunk | OpenAIError | DONE
CompletionEvent = CompletionChunk | OpenAIError | DONE


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list[str]
    type: Literal["model"]
    display_name: str
    created_at: str
    max_input_tokens: int


class ModelList(TypedDict):
    """All models; has_more, first_id and last_id are Anthropic's way to say so."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None


class PromptUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """embedding: floats, or with `encoding_format: base64` the base64 of them as 32-bit little-endian floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Score(TypedDict):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class GenerativeScoreList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Document(TypedDict):
    text: str


class Ranked(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[Document]


class RankingUsage(TypedDict):
    total_tokens: int


class Ranking(TypedDict):
    id: str
    model: str
    usage: RankingUsage
    results: list[Ranked]
