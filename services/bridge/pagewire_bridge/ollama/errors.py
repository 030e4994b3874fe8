"""Ollama's errors: one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError
from starlette.responses import Response

from pagewire_bridge.responses import http_status, json_response, retry_after


def error_object(error: PagewireError) -> dict[str, object]:
    """For a response, or for a line of a stream. Clients look for the words "not found"."""
    if error.code == pb.ERROR_CODE_MODEL_NOT_FOUND:
        return {"error": f"model not found: {error.message}"}
    return {"error": error.message}


def error_response(error: PagewireError) -> Response:
    # Ollama answers 503 where its queue is full.
    status = 503 if error.code == pb.ERROR_CODE_OVERLOADED else http_status(error)
    return json_response(error_object(error), status, retry_after(error, status))


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    return json_response({"error": message}, status, headers)
