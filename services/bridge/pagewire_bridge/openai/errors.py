"""OpenAI's error object and status for everything that can go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import STATUS, PagewireError
from starlette.responses import Response

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
    # The call was cancelled behind us, not by the client: it is still there to read this.
    pb.ERROR_CODE_CANCELLED: ("service_unavailable_error", "service_unavailable"),
    pb.ERROR_CODE_INCOMPATIBLE: ("server_error", "internal_error"),
    pb.ERROR_CODE_INTERNAL: ("server_error", "internal_error"),
}
_TRY_AGAIN = (429, 503)


def json_response(
    content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


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
    status = 503 if error.code == pb.ERROR_CODE_CANCELLED else STATUS[error.code][1]
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if status in _TRY_AGAIN else None
    return json_response(from_error(error), status, headers)
