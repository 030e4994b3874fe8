"""OpenAI's error object and status for everything that can go wrong."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError
from starlette.responses import Response

from pagewire_bridge.responses import http_status, json_response, retry_after

INVALID_REQUEST = "invalid_request_error"
# Clients recognise a context overflow by these words, whatever the code says.
CONTEXT_WORDS = "maximum context length"

# ErrorCode -> (type, code).
_KINDS: dict[int, tuple[str, str | None]] = {
    pb.ERROR_CODE_INVALID_REQUEST: (INVALID_REQUEST, None),
    pb.ERROR_CODE_CONTEXT_LENGTH: (INVALID_REQUEST, "context_length_exceeded"),
    pb.ERROR_CODE_MODEL_NOT_FOUND: (INVALID_REQUEST, "model_not_found"),
    pb.ERROR_CODE_OVERLOADED: ("rate_limit_error", "rate_limit_exceeded"),
    pb.ERROR_CODE_UNAVAILABLE: ("service_unavailable_error", "service_unavailable"),
    pb.ERROR_CODE_DEADLINE: ("timeout_error", "deadline_exceeded"),
    pb.ERROR_CODE_CANCELLED: ("service_unavailable_error", "service_unavailable"),
    pb.ERROR_CODE_INCOMPATIBLE: ("server_error", "internal_error"),
    pb.ERROR_CODE_INTERNAL: ("server_error", "internal_error"),
}
_HTTP_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "uri_too_long",
    431: "headers_too_large",
}


def error_object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    """All four keys are always there: some clients read them without asking."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_error(error: PagewireError) -> dict[str, object]:
    """The error object of `error`, for a response or for an event of a stream."""
    kind, code = _KINDS[error.code]
    message, param = error.message, error.param or None
    if error.code == pb.ERROR_CODE_CONTEXT_LENGTH and CONTEXT_WORDS not in message:
        message = f"The request exceeds the model's {CONTEXT_WORDS}: {message}"
    if error.code == pb.ERROR_CODE_MODEL_NOT_FOUND:
        param = param or "model"
    return error_object(message, kind, param, code)


def error_response(error: PagewireError) -> Response:
    """Error object, status, and Retry-After (whole seconds) where trying again makes sense."""
    status = http_status(error)
    return json_response(from_error(error), status, retry_after(error, status))


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    """What the framework refuses: an unknown route, a method, a body that is too large."""
    return json_response(error_object(message, INVALID_REQUEST, None, _HTTP_CODES.get(status)), status, headers)
