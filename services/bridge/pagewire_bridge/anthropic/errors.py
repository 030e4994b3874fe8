"""Anthropic's error object and status."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError
from starlette.responses import Response

from pagewire_bridge.responses import json_response, retry_after

# ErrorCode -> (status, type).
_KINDS: dict[int, tuple[int, str]] = {
    pb.ERROR_CODE_INVALID_REQUEST: (400, "invalid_request_error"),
    pb.ERROR_CODE_CONTEXT_LENGTH: (400, "invalid_request_error"),
    pb.ERROR_CODE_MODEL_NOT_FOUND: (404, "not_found_error"),
    pb.ERROR_CODE_OVERLOADED: (429, "rate_limit_error"),
    pb.ERROR_CODE_UNAVAILABLE: (529, "overloaded_error"),
    pb.ERROR_CODE_DEADLINE: (504, "timeout_error"),
}
_OTHER = (500, "api_error")
_OF_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}


def error_object(message: str, kind: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def from_error(error: PagewireError) -> dict[str, object]:
    """For a response, or for an event of a stream."""
    message = error.message
    if error.code == pb.ERROR_CODE_CONTEXT_LENGTH:
        message = f"prompt is too long: {message}"  # by these words clients know it
    return error_object(message, _KINDS.get(error.code, _OTHER)[1])


def error_response(error: PagewireError) -> Response:
    status = _KINDS.get(error.code, _OTHER)[0]
    return json_response(from_error(error), status, retry_after(error, status))


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    return json_response(error_object(message, _OF_STATUS.get(status, "invalid_request_error")), status, headers)
