"""From bytes to a validated body: every mistake is an InvalidRequest that names its field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import orjson
from pagewire_core.errors import InvalidRequest
from pydantic import ValidationError

from pagewire_bridge.openai.schema import ChatBody, GenerationBody
from pagewire_bridge.openai.unsupported import refuse_unsupported, refuse_unsupported_in_message

Body = TypeVar("Body", bound=GenerationBody)


def parse_body(model: type[Body], data: bytes) -> Body:
    """Raises InvalidRequest: not JSON (NaN and lone surrogates included), not an object, or a bad field."""
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("The body must be a JSON object.")
    refuse_unsupported(fields)
    try:
        body = model.model_validate(fields)
    except ValidationError as error:
        raise _first_mistake(error) from None
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages):
            refuse_unsupported_in_message(message.model_extra or {}, f"messages[{i}]")
    return body


def ignored_fields(body: GenerationBody) -> list[str]:
    """Names of the fields that have no effect; a nested one carries its parent's name."""
    names = list(body.model_extra or ())
    if body.stream_options is not None:
        names += [f"stream_options.{name}" for name in body.stream_options.model_extra or ()]
    return names


def _first_mistake(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _dotted(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"`{param}` is required.", param)
    message = first["msg"]
    return InvalidRequest(f"`{param}` is not valid: {message[:1].lower()}{message[1:]}.", param)


def _dotted(location: Sequence[int | str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")
