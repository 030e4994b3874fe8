"""What is said of a route in the document, beside what the code shows by itself: path, method, key, shape of errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
from starlette.requests import Request
from starlette.responses import Response

Endpoint = Callable[[Request], Awaitable[Response]]
Raises = tuple[type[PagewireError], ...]

DONE = Literal["[DONE]"]  # the last event of OpenAI's streams, which is not JSON
JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"

# What any question to the router may end in, and what one may that names a model.
ASKING: Raises = (Overloaded, Unavailable, DeadlineExceeded, Internal)
ASKING_OF_MODEL: Raises = (*ASKING, InvalidRequest, ContextLength, ModelNotFound)


@dataclass(frozen=True)
class Operation:
    """body: the model that validates it, or a union of them. raises: of what may go wrong, what has a status.

    answer: the type of a whole JSON answer. others: other media types of an answer: the type of each event of a stream
    or of each line; str for text. headers: names of response headers of the API, see `headers.py`. refuses: statuses
    that come without a PagewireError. statuses: those that are no errors of the API, with their type. path_values:
    those that a path parameter may have. query: schemas of the parameters in a query, all optional.
    """

    summary: str
    body: Any = None
    answer: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
    raises: Raises = ()
    refuses: Sequence[int] = ()
    statuses: Mapping[int, Any] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path_values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """By media type."""
        return {**({JSON: self.answer} if self.answer is not None else {}), **self.others}


@dataclass(frozen=True)
class Api:
    """A part of the document."""

    name: str
    description: str
    operations: Mapping[Endpoint, Operation]
