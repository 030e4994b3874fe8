"""What Ollama's routes answer, as types for the OpenAPI document. Durations are in nanoseconds.

Keys that are not required may be absent: those of a last line are in whole answers, too.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from pagewire_bridge.openapi.errors import OllamaError


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class _Line(TypedDict):
    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[Literal["stop", "length", "load", "unload"]]
    logprobs: NotRequired[list[Logprob]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    prompt_truncated: NotRequired[int]


class GenerateLine(_Line):
    """context: the tokens so far, for the next request."""

    response: str
    thinking: NotRequired[str]
    context: NotRequired[list[int]]


class Function(TypedDict):
    index: int
    name: str
    arguments: Any


class ToolCall(TypedDict):
    id: str
    function: Function


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatLine(_Line):
    message: AssistantMessage


GenerateEvent = GenerateLine | OllamaError
ChatEvent = ChatLine | OllamaError


class EmbedAnswer(TypedDict):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsAnswer(TypedDict):
    embedding: list[float]


class Version(TypedDict):
    version: str


class ModelDetails(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class _Model(TypedDict):
    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails


class ListedModel(_Model):
    modified_at: str
    capabilities: list[str]


class RunningModel(_Model):
    expires_at: str
    size_vram: int
    context_length: int


class Tags(TypedDict):
    models: list[ListedModel]


class Running(TypedDict):
    models: list[RunningModel]


class Shown(TypedDict):
    """model_info: by names such as general.architecture."""

    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str
    details: ModelDetails
    model_info: dict[str, str | int]
    capabilities: list[str]
