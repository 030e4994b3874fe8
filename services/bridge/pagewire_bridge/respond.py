"""The life of a generation behind one HTTP request: accepted first, then answered, closed whatever happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pagewire.v1.inference_pb2 import GenerateRequest
from starlette.requests import Request
from starlette.responses import Response

from pagewire_bridge.client import client_of, time_allowed
from pagewire_bridge.disconnect import until_disconnect
from pagewire_bridge.generation import Generation


def name_request(request: Request, asked: str | None) -> str:
    """Its id: the X-Request-Id header wins over the field `asked`, and both over the minted one."""
    if asked and not request.state.named_by_client:
        request.state.request_id = asked
    request_id: str = request.state.request_id
    return request_id


def begin(request: Request, asked: Sequence[GenerateRequest], n: int, *, detached: bool = False) -> Generation:
    """The calls behind a request, one for each prompt, for the tenant whose key it has shown.

    detached: nobody in front of us waits for the answer.
    """
    for one in asked:
        one.tenant = request.state.tenant
    client, allowed_s = client_of(request), math.inf if detached else time_allowed(request)
    return Generation([client.generate(one, allowed_s) for one in asked], n, request.state.charge)


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
            response = stream()
            streaming = True
            return response
        return await until_disconnect(request.receive, whole())
    finally:
        if not streaming:
            await generation.close()
