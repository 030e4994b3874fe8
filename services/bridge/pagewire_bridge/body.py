"""From a request to a validated body, for every API: each mistake is an InvalidRequest that names its field."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pagewire_bridge.by_type import UNKNOWN, without_kinds
from pagewire_bridge.json_text import TooDeep, read

MAX_BODY_BYTES = 32 << 20
MAX_BODY_S = 300.0

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises HTTPException 413 as soon as it is known to be too large."""
    too_large = HTTPException(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"The body did not come within {MAX_BODY_S:.0f} s.") from None
    return bytes(body)


def to_object(data: bytes, what: str = "The body") -> dict[str, Any]:
    """Raises InvalidRequest: not JSON (NaN and lone surrogates included), nested too deeply, or not an object.

    what: the data are, as messages call it.
    """
    try:
        fields = read(data)
    except TooDeep as error:
        raise InvalidRequest(f"{what} is {error}.") from None
    except ValueError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{what} must be a JSON object.")
    return fields


def validated(model: type[Body], fields: Mapping[str, Any], where: str = "") -> Body:
    """Raises InvalidRequest for the first field that is missing or wrong. where: the place of `fields` in the body."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_mistake(error, where) from None


def _first_mistake(error: ValidationError, where: str) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = without_kinds(first["loc"]) + ["type"] * (first["type"] == UNKNOWN)
    param = _dotted((where, *place) if where else place)
    if first["type"] == "missing":
        return InvalidRequest(f"`{param}` is required.", param)
    message = first["msg"]
    return InvalidRequest(f"`{param}` is not valid: {message[:1].lower()}{message[1:]}.", param)


def _dotted(location: Sequence[int | str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")
