"""The life of a generation behind one HTTP request: accepted first, then answered, closed whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pagewire_bridge.disconnect import until_disconnect
from pagewire_bridge.generation import Generation


async def respond(
    request: Request,
    generation: Generation,
    *,
    stream: Callable[[], Response] | None,
    whole: Callable[[], Coroutine[Any, Any, Response]],
) -> Response:
    """Answers only after the router has accepted every prompt, so that a refusal has its status.

    stream: makes the response that sends deltas as they come, and closes the generation itself; None: the client
    wants the answer whole. Raises PagewireError, and ClientGone when the client leaves.
    """
    streaming = False
    try:
        await until_disconnect(request.receive, generation.open())
        if stream is not None:
            streaming = True
            return stream()
        return await until_disconnect(request.receive, whole())
    finally:
        if not streaming:
            await generation.close()
