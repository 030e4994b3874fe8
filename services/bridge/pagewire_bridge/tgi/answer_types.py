"""What TGI's routes answer, as types for the OpenAPI document. Keys that are not required may be absent."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from pagewire_bridge.openapi.errors import TGIError

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Token(TypedDict):
    id: int
    text: str
    logprob: float
    special: bool


class PromptToken(TypedDict):
    """logprob: null for the first token."""

    id: int
    text: str
    logprob: float | None


class Details(TypedDict):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[Token]
    top_tokens: NotRequired[list[list[Token]]]


class Sequence(Details):
    generated_text: str


class BestDetails(Details):
    best_of_sequences: NotRequired[list[Sequence]]


class GenerateAnswer(TypedDict):
    generated_text: str
    details: NotRequired[BestDetails]


class StreamDetails(TypedDict):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class TokenEvent(TypedDict):
    """generated_text and details: null in every event but the last."""

    index: int
    token: Token
    top_tokens: NotRequired[list[Token]]
    generated_text: str | None
    details: StreamDetails | None


StreamEvent = TokenEvent | TGIError


class Predictions(TypedDict):
    predictions: list[str]


class Info(TypedDict):
    model_id: str
    model_sha: str
    model_dtype: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: None
    docker_label: None


class SimpleToken(TypedDict):
    """start and stop: where its text is in the prompt, in characters."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokens(TypedDict):
    tokenize_response: list[SimpleToken]
    templated_text: str


class Server(TypedDict):
    name: str
    version: str
    extensions: list[str]


class Live(TypedDict):
    live: bool


class Ready(TypedDict):
    live: bool
    ready: bool


class TensorMetadata(TypedDict):
    name: str
    datatype: Literal["BYTES"]
    shape: list[int]


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(TypedDict):
    """data: one string, or the bytes of its UTF-8 where the input came as bytes."""

    name: str | None
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[str] | list[int]


class InferAnswer(TypedDict):
    id: str
    outputs: list[OutputTensor]
