"""Whose errors a path speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pagewire_core.errors import PagewireError
from starlette.responses import Response

from pagewire_bridge.anthropic import errors as anthropic
from pagewire_bridge.ollama import errors as ollama
from pagewire_bridge.openai import errors as openai
from pagewire_bridge.tgi import errors as tgi


class ErrorShape(Protocol):
    def error_response(self, error: PagewireError) -> Response: ...

    def http_error_response(self, status: int, message: str, headers: Mapping[str, str] | None) -> Response:
        """What the framework refuses: an unknown route, a method, a body that is too large."""


_BEGINNINGS: tuple[tuple[str, ErrorShape], ...] = (
    ("/api/", ollama),
    ("/v1/messages", anthropic),
    ("/generate", tgi),
    ("/info", tgi),
    ("/chat_tokenize", tgi),
    ("/vertex", tgi),
    ("/v2/rerank", openai),
    ("/v2", tgi),
)


def error_shape(path: str) -> ErrorShape:
    """OpenAI's, unless the path is another API's. POST / is TGI's."""
    if path == "/":
        return tgi
    return next((shape for beginning, shape in _BEGINNINGS if path.startswith(beginning)), openai)
