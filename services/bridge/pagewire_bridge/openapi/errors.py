"""Every error of a route: its statuses and examples are asked of the code that makes the errors of its API."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson
from pagewire_core.errors import (
    ContextLength,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PagewireError,
    Unavailable,
)
from starlette.responses import Response
from typing_extensions import TypedDict

from pagewire_bridge.anthropic import errors as anthropic
from pagewire_bridge.error_shapes import ErrorShape, error_shape
from pagewire_bridge.ollama import errors as ollama
from pagewire_bridge.openai import errors as openai
from pagewire_bridge.openapi.headers import refer
from pagewire_bridge.openapi.operation import JSON, Raises
from pagewire_bridge.tgi import errors as tgi


class OpenAIErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(TypedDict):
    """OpenAI's, with all four keys."""

    error: OpenAIErrorObject


class TGIError(TypedDict):
    """TGI's."""

    error: str
    error_type: str


class OllamaError(TypedDict):
    """Ollama's: one sentence."""

    error: str


class AnthropicErrorObject(TypedDict):
    type: str
    message: str


class AnthropicError(TypedDict):
    """Anthropic's."""

    type: str
    error: AnthropicErrorObject


_ANSWERS: tuple[tuple[ErrorShape, Any], ...] = (
    (openai, OpenAIError),
    (tgi, TGIError),
    (ollama, OllamaError),
    (anthropic, AnthropicError),
)
# What the framework refuses, and what may go wrong behind it.
_REFUSALS = {
    401: "The API key is missing or is not known here.",
    403: "This needs an API key with `admin: true` in --api-keys-file.",
    404: "There is nothing of that name.",
    408: "The body did not come in time.",
    413: "The body is too large.",
}
_ERRORS: dict[type[PagewireError], str] = {
    InvalidRequest: "A field is missing, wrong or not supported.",
    ContextLength: "Prompt and answer do not fit the model.",
    ModelNotFound: "No such model is served.",
    Overloaded: "The queue is full, or a limit of the API key is used up.",
    Unavailable: "Nothing can serve this now.",
    DeadlineExceeded: "It took longer than the server allows.",
    Internal: "The server failed.",
}


def error_type(path: str) -> Any:
    """What the errors of a path look like."""
    return next(answer for shape, answer in _ANSWERS if shape is error_shape(path))


def error_responses(path: str, raises: Raises, refuses: Iterable[int]) -> dict[str, Any]:
    """References by status, to what `to_components` makes."""
    shape, prefix = error_shape(path), _prefix(error_type(path))
    statuses = {*refuses, *(shape.error_response(error("")).status_code for error in raises)}
    return {str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in sorted(statuses)}


def to_components(schemas: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Every error of every API, by names such as OpenAI400. schemas: of a type."""
    components: dict[str, Any] = {}
    for shape, answer in _ANSWERS:
        found = dict[int, dict[str, Response]]()
        for status, sentence in _REFUSALS.items():
            found.setdefault(status, {})[sentence] = shape.http_error_response(status, sentence, None)
        for error, sentence in _ERRORS.items():
            response = shape.error_response(error(sentence))
            found.setdefault(response.status_code, {})[sentence] = response
        for status, responses in found.items():
            components[f"{_prefix(answer)}{status}"] = _response(responses, schemas(answer))
    return components


def _prefix(answer: Any) -> str:
    return str(answer.__name__).removesuffix("Error")


def _response(responses: dict[str, Response], schema: Any) -> dict[str, Any]:
    """responses: by what is wrong."""
    retries = ("retry-after",) if any("retry-after" in response.headers for response in responses.values()) else ()
    examples = {f"{i}": {"value": orjson.loads(response.body)} for i, response in enumerate(responses.values(), 1)}
    return {
        "description": " ".join(responses),
        "headers": refer(("x-request-id", *retries)),
        "content": {JSON: {"schema": schema, "examples": examples}},
    }
