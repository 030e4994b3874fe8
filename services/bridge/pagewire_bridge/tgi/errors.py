"""TGI's errors: a sentence, a type, and the status that goes with it."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError
from starlette.responses import Response

from pagewire_bridge.responses import json_response, retry_after

# ErrorCode -> (status, error_type).
_KINDS: dict[int, tuple[int, str]] = {
    pb.ERROR_CODE_INVALID_REQUEST: (422, "validation"),
    pb.ERROR_CODE_CONTEXT_LENGTH: (422, "validation"),
    pb.ERROR_CODE_MODEL_NOT_FOUND: (404, "validation"),
    pb.ERROR_CODE_OVERLOADED: (429, "overloaded"),
    pb.ERROR_CODE_UNAVAILABLE: (503, "healthcheck"),
}
_OTHER = (424, "generation")


def error_object(error: PagewireError) -> dict[str, object]:
    """For a response, or for an event of a stream."""
    return {"error": error.message, "error_type": _KINDS.get(error.code, _OTHER)[1]}


def error_response(error: PagewireError) -> Response:
    status = _KINDS.get(error.code, _OTHER)[0]
    return json_response(error_object(error), status, retry_after(error, status))


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    """What the framework refuses: a method, a body that is too large."""
    return json_response({"error": message, "error_type": "validation"}, status, headers)
